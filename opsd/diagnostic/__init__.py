"""The branch-viability diagnostic (arXiv:2605.21606, section 3.2), with a control that the paper lacks.

`spines` and `sampling` draw, `model` scores, `analysis`, `statistics` and `schedule` compute, `report` and
`plot` show.
"""
