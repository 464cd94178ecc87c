"""How a layer comes to compute with an expression, and stops.

`paths` finds the weight that a name means, `counterparts` those that a layer in the place of an expression shares,
`fit` says whether the tie fits and gives weights their start values, `tied` makes the layer's class one that hands out
views, `swap` puts a view in the place of a variable, and `state` is what the layer remembers of it. `tie` and `untie`
are the verbs, which call these in that order; a `penalty` ties softly.
"""
