"""One pass through a chat template for many renderings of a conversation: all prefixes, with and without prompt.

The template is compiled by jinja's own compiler into code that computes with the values of all renderings at once
(`worlds`). A rendering that comes out is, character for character, what `ChatTemplate.render` gives: every test,
lookup, filter and call is made for each value that renderings differ in, and what cannot be done so is not proven and
left to `render`. Nothing depends on this module but speed: ``--no-trace`` does without it.
"""

from chatloss.traced.expressions import Unsupported
from chatloss.traced.render import TracedTemplate, World

__all__ = ["TracedTemplate", "Unsupported", "World"]
