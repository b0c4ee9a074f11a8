"""The offline half of HR-Pro Stream: from features and point labels to a trained model.

Nothing is imported here; torch is loaded only by the modules that need it.
"""
