"""Comparing the engine with a reference, component by component: where do the numbers leave it, and by how much?"""
