"""Time to a target loss: hybrid optimizers against tuned baselines, on small tasks.

    python -m benchmarks.target mlp --batch-size 2000 --steps 500     # tunes, trains, times, prints a table
    python -m benchmarks.target.report                                # writes docs/benchmarks.md and its plots

The tasks are image classifiers, an autoencoder, character models, linear models, differential equations that networks
are trained to solve, and an image that a network is fitted to (`tasks`). Of the last two kinds tests give the relative
error in the L2 norm.

Every method's peak learning rate is tuned by the same rule (`study.tune`) on a seed of its own; then it is trained from
other seeds. The time to a target is the number of steps to it times the seconds per step. The two are measured apart:
training runs may be made two at a time on a busy machine, step times are taken alone (`--phase time`).

XLA on CPU runs the derivatives of convolutions tens of times slower inside conditionals and loops, where the curvature
products of the hybrids and the line search of L-BFGS are. There `cnn`, `resnet` and `resnet_bn` write them as products
of patches, for all methods.
"""
