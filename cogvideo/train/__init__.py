"""Train: a recipe becomes a run, and a run a model folder.

recipes        the curricula, as one table
phase          one phase of a recipe
run            what is finished, what comes next, and all checks before work starts
loop           the training loop
objectives     what a phase is: its check, its loss, its cost, its preview
inputs         what a loss reads of a batch
losses         the hierarchical loss
discriminator  the adversary of a video decoder
optim          optimizers and learning rates
parallel       several processes or devices, applied from outside
inherit        what a new run begins with
checkpoint     save and resume
report         log, loss curve
preview        sample strips
cost           floating-point operations of a step
pace           how fast a recipe trains here
"""
