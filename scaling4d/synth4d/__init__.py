"""A procedural 4D world: rooms with moving bodies and a moving camera, and everything known about them.

Needs NumPy and PyAV only. Reading order: ``scene.py`` (what a scene is), ``world.py`` (drawn from a seed), ``cast.py``
(geometry), ``shading.py`` and ``textures.py`` (color), ``render.py`` (a video with its ground truth), ``write.py``
(folders of videos).
"""
