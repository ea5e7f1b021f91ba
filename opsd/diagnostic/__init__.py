"""The branch-viability diagnostic (arXiv:2605.21606, section 3.2), with a control that the paper lacks.

A base model and problems with reference solutions enter; a table of branches, a picture and a report leave.
`spines` and `sampling` draw, `model` scores, `analysis`, `statistics` and `schedule` compute, `report` and
`plot` show.
"""
