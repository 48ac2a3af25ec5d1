"""The seed paper's experiment: four clouds, unequal data, four ways to aggregate; and how data are
divided among unequal clouds.

    setting     clouds, prices, methods
    exchanges   meetings that the simulator does not know
    train       one run of one method
    division    a shared corpus: equal, weighted and dynamic shares
    figure      the drawing
"""
