"""Files that go along with an exported model (remote code for transformers); the engine does not import
them.
"""
