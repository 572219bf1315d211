from .recipes import find_recipe as find_recipe
from .recipes import recipe_names as recipe_names
from .vision import digits as digits
from .vision import digits_folder as digits_folder
from .vision import folder as folder
from .vision import image_classifier as image_classifier
