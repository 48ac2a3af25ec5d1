"""What privacy costs, and what attackers get in spite of it.

setting      model, text, public start, manifests
swarm        peers of the product's own parts, and what each shows the others
utility      loss against epsilon: swarm, each peer alone, the start
bounds       statistics of attacks: lower bounds on epsilon, exposure, rates
attacked     canaries and membership, from the released model and from what a partner sees
whitebox     canary gradients against the sequence of noised sums
inversion    text from the gradient of one record
lora         a real pretrained model, adapters alone trained
accounting   four accountants on the same charges
cost         of privacy in time and memory
masking      cost of masked groups
jobs, work   runs that are kept, so that the command can be resumed
"""
