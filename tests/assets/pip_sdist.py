"""Download one source archive as pip would, without the metadata build that `pip download` cannot skip.

Run as a script: `pip_sdist.py PROJECT FILENAME FOLDER`. The index, mirrors, proxies and certificates are those pip
itself is configured with; pip has no public interface for this, hence its internals and the separate process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(project: str, filename: str, folder: str) -> None:
    """Write `filename` of `project` into `folder`, or exit with a message."""
    from pip._internal.commands.download import DownloadCommand
    from pip._internal.index.collector import parse_links

    command = DownloadCommand("download", "")
    options, _ = command.parse_args(["--no-input", project])
    with command.main_context():
        session = command.get_default_session(options)
        collector = command._build_package_finder(options, session)._link_collector
        links: list[Any] = []

        def collect(page: Any) -> list[Any]:
            response = collector.fetch_response(page)
            if response is not None:
                links.extend(parse_links(response))
            return []

        sources = collector.collect_sources(project, candidates_from_page=collect)
        for source in (*sources.find_links, *sources.index_urls):
            if source is not None:
                list(source.page_candidates())
                links.extend(source.file_links())
        link = next((link for link in links if link.filename == filename), None)
        if link is None:
            sys.exit(f"{filename} is on none of pip's configured indexes")
        response = session.get(link.url_without_fragment, stream=True, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        with (Path(folder) / filename).open("wb") as out:
            for chunk in response.iter_content(1 << 20):
                out.write(chunk)


if __name__ == "__main__":
    main(*sys.argv[1:])
