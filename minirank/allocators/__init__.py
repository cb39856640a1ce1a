"""The methods that decide ranks: score() measures a model, allocate(budget) divides a budget.

Which one?

    method           file            when                  needs
    UniformRanks     uniform.py      before training       the model alone
    SensitivityLoRA  sensitivity.py  before training       forward passes over calibration data
                                                           (with its default curvature)
    L1RA             l1ra.py         during training       a gated model and its optimizer
    ShapLoRA         shaplora.py     after one training,   validation data, and 90 forward and
                                     before a second       backward passes over it
    SingularValues   singular_       after one training,   the trained model, and a forward pass
                     values.py       before a second       over some data

Start with uniform ranks, and train them once more with room, say four times the ranks. If that does
not lower the loss, no division of the budget will. If it does, the trained model shows where ranks
are needed: `SingularValues` (examples/two_trainings.py; what was found with each method is in
examples/results/README.md). Compare methods by `unit="parameters"`, because ranks that move to
wide layers cost more parameters there.

All methods return an `Allocation`, for `wrap` or `resize`. L1RA moves ranks by itself, in `step()`:
its `allocate` answers what an update would do. A budget counts ranks, which are met exactly, or
trainable parameters (`unit="parameters"`), never exceeded, with too little left for one more rank.
`min_rank` and `max_rank` are options of `allocate` (L1RA, which allocates by itself, takes them
when it is made too): one bound for all modules, or {full name: bound}. `targets` are exact names,
globs, a type or a function. A pattern that matches nothing is an error. By default every linear
layer is a target, heads and poolers too, but no head whose weight is an embedding's: name the
layers that you will adapt, such as "bert.encoder.*". Below its table an Allocation says which part
of the model's matrices the targets are, and what is left out (`minirank/layers/coverage.py`).

    >>> from torch import nn
    >>> from minirank import UniformRanks
    >>> layers = {"q": nn.Linear(8, 8), "v": nn.Linear(8, 8), "up": nn.Linear(8, 32)}
    >>> model = nn.ModuleDict({**layers, "head": nn.Linear(32, 2)})
    >>> allocator = UniformRanks(model, targets=["q", "v", "u*"])
    >>> scores = allocator.score()
    >>> allocation = allocator.allocate(150, unit="parameters", max_rank={"up": 2})
    >>> print(allocation)
    uniform: 6 ranks, 144 parameters (budget 150 parameters)
         q       v       up        sum
         2 ████  2 ████  2 ████      6
    sum  2       2       2           6
    The targets reach 86 % of the model's matrix entries. Left out:
       14 %  1 × linear layer (not among the targets): head

The other files, each of which imports only from files before it:

    table.py         ranks as a table of text
    plot.py          ranks as heat maps, for which matplotlib is needed
    allocation.py    the record that every method returns
    constraints.py   budget, costs and bounds of the modules
    dominance.py     the warning of `allocate` where one module takes too much of the budget
    allocator.py     what all methods share, and how to write one of your own
    stability.py     which ranks would change within the scores' sampling error, and so how much
                     data is enough: SensitivityLoRA.stability and .settle
    gates.py         L1RA: the shrinkage, and the gates' own parameter group
    reassign.py      L1RA: which ranks are pruned, and which modules get new ones
    history.py       L1RA: the record of ranks that move
    masked_gates.py  ShapLoRA: gates set to zero, and gradients over a whole data set
                     (`minirank/shapley.py` draws the coalitions)

The letters are those of each paper: λ is the penalty in L1RA's files, and a gate in ShapLoRA's.
"""
