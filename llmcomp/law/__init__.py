"""Rows or cells -> laws, their uncertainty, and figures. Knows only the rows' table and the errors: no model code.

fit: tables -> laws, forms compared; joint: one law of several data sets. tables: axes by name, the cells of each law.
forms: the formulas; projection: least squares; region: confidence and predictive intervals; random_effect: training
runs. scaling_law, laws: one fitted law, several; holdout, plan, report: what it does beyond its cells, what to measure
next, a report for a reader; text: how numbers are written. style, plot: the figures; figures: all of them, written to
a folder. Only these last three import matplotlib.
"""
