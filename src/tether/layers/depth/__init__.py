"""Weights that many layers have in one piece: stacked, by `bank`, and shared through the depth of a model.

`bank` stacks weights of one shape; `repeat` is one block that runs many times with an entry of each stack, whose
`turns` run one by one or in a loop of the backend. `share_depth` ties the `blocks` of a model by a pattern of its depth
and says in a report what became of them.
"""
