"""Collection formats: each module finds the files of one format, checks them line by line, and reads them.

A format turns a folder (or a dataset of `ir_datasets`, or the installed packages' docstrings) into a
`folders.Source`. Everything written to the work folder is written by `data.writing`, not here.
"""
