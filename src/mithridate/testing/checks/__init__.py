"""What every component must pass: the rules of all kinds in `component`, those of one kind in a file of its name.

A check is a function that takes a class and raises AssertionError with what is wrong.
"""
