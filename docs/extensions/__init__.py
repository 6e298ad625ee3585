"""Extensions of Sphinx for the site. May import Sphinx and the standard library only."""
