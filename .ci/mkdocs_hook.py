"""MkDocs hook that adds results/ to the site, so that links to `../results/FILE` work there."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    """Add results/ to the site; of single runs the pictures alone."""
    for path in sorted((ROOT / "results").rglob("*")):
        of_a_run = "recipes" in path.relative_to(ROOT).parts
        if path.is_file() and (path.suffix == ".png" or not of_a_run):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, ROOT, config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to results/ from where the pages lie in the site."""
    return markdown.replace("](../results/", "](results/")
