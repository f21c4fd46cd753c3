"""Privacy losses of many steps, composed by Fourier transform.

In the order in which they build on each other: `step` (the loss of one step), `lattice` (where it is composed), `spectrum`
(composing), `tail` (ε of the whole), `history` (a composed history, to which steps are added), `store` (its file), `memory` (what
is known already), `composer` (a ledger's).
"""
