"""Host memory of loading, saving and exporting."""
