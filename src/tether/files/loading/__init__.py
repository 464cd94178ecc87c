"""Which value is for which weight, when a file's sharing is not the model's.

`entries` are what a file has, `matching` says which of them is for which weight, `assignment` plans all of it before
anything is assigned; `untied` loads a checkpoint of other sharing so, and `retie` ties what was saved apart.
"""
