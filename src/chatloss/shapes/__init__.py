"""Renderings by shape: what a template does with one conversation, recorded once and replayed for all others like it.

Most conversations of a corpus differ in nothing but their words: who speaks when, who calls how many tools. A recording
(`recorder`, `sandbox`) is one rendering in which every text of the messages is a symbol: what the template does with
symbols is kept as steps, what it asks of them as guards, what it writes as pieces. Where a conversation of the same
shape passes all guards the template would take the same way, so its text is the same pieces with its own words in them
(`program`, `shapes`). Whatever cannot be recorded so is rendered as ever. Used in one place: `ChatTemplate.render_all`.
"""
