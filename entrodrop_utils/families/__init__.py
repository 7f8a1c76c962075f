"""Model families: where the decoder layers of each keep their attention and their MLP.

``layouts`` is the table to extend for a new family. ``decoder`` finds the layers of a model and the layout that fits them,
``self_check`` verifies that layout on the model itself, and ``modeling_entrodrop`` is the file that travels with a saved model.
"""
