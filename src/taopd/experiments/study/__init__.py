"""A study: arms x training seeds from one file, each arm in its own process, and what they say.

`file` reads and checks the study file, `expand` turns it into arms with their controls, `run` runs them,
`analysis` compares their results by `statistics`. The analysis needs only the arms' `results.json`, so
results of another engine are compared the same way. Nothing is imported here: analysis and statistics
need neither torch nor transformers.
"""
