"""Drawn scenes with exact answers: the training, calibration and evaluation pictures of `mini-llava`.

Everything is drawn by this package from a seed, so a picture, its objects and its questions can be made
again on any machine from one integer. numpy and Pillow only.
"""

from svdprune.calib.scenes.draw import COLORS, SHAPES, Scene, SceneObject, draw_scene
from svdprune.calib.scenes.questions import KINDS, Question, ask

__all__ = ["COLORS", "KINDS", "SHAPES", "Question", "Scene", "SceneObject", "ask", "draw_scene"]
