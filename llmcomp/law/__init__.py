"""Rows or cells -> laws, their uncertainty, and figures. Knows only the rows' table and the errors: no model code.

fit: tables -> laws; scaling_law: the fitted law; projection: the numerics. style, plot: the figures; figures: all of
them, written to a folder. Only these last three import matplotlib.
"""
