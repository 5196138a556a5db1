"""Cases made after public reports of this field, one file each, and sixty forms of transcript files.

A file is named for its case, ``test_NN_slug.py``; its first line says what is right, and its inputs are written in it
or lie in ``forms/``. Each test is of the whole kind of fault that its case is an example of.
"""
