"""Physical removal of whole neurons: which go together, which matter least, how many go, and the cut itself.

Nothing in here knows how an optimizer comes by its gradients.
"""
