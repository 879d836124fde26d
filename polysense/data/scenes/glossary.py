"""What a dictionary would say about the things and colours of the scenes: a built-in one, small enough to read."""

GLOSSES = {
    "circle": "a round figure whose edge is everywhere equally far from its middle", "square": "a figure with four equal sides and four right angles",
    "triangle": "a figure with three sides and three corners", "star": "a figure with five points around its middle",
    "heart": "a figure with two round bumps above and one point below", "cross": "two bars that meet in the middle at right angles",
    "ring": "a round band around a round hole", "crescent": "a thin bent figure with two points, like the young moon",
    "hexagon": "a figure with six sides", "arrow": "a bar with a pointed head that shows a direction",
    "diamond": "a square that stands on one corner", "ellipse": "a round figure that is longer than it is wide",
    "pentagon": "a figure with five sides", "semicircle": "half of a round figure, with one straight edge",
    "trapezoid": "a figure with four sides, two of which run side by side",
    "red": "the colour of blood", "green": "the colour of grass", "blue": "the colour of a clear sky", "yellow": "the colour of lemons",
    "orange": "a colour between red and yellow", "purple": "a colour between red and blue", "pink": "a pale red",
    "cyan": "a colour between green and blue", "brown": "the colour of soil", "white": "the colour of snow",
    "grey": "a colour between black and white", "black": "the colour of coal", "digit": "a written sign for a number"}
