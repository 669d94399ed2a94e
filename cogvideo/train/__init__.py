"""Train: a recipe becomes a run, and a run a model folder.

recipes        the curricula, as one table
phase          one phase of a recipe
run            a run: its options, what is finished, where a phase begins, whether it can work
loop           the training loop
objectives     the kinds of phases: check, loss, preview, cost
inputs         what a loss reads of a batch
losses         cross-entropy of codes, and the hierarchical loss of frames
discriminator  the adversary of a video decoder
optim          optimizers and learning rates
peers          the processes that train together: how they start and exchange values
mesh           how they divide clips, weights and matrices
parallel       a step on several devices, applied from outside
muon           Muon on several processes
slices         matrices cut over devices, and the table of how
footprint      what a mesh holds in each process, without its memory
inherit        the weights that a new run starts from
checkpoint     save and resume
report         log, loss curve
preview        images of progress
cost           floating-point operations of a step
pace           how fast a recipe trains here
"""
