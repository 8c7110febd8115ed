"""``hrvlm search``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .console import note
from .options import Backend, Device, Fetch, Images
from .tables import counted, print_line, print_table

if TYPE_CHECKING:
    from ..embed.search import SearchResult


def show(result: SearchResult) -> None:
    """The hits of ``hrvlm search``."""
    for found in result.found:
        print_table(
            [str(found.query), "row", result.by],
            [(hit.id, hit.row, f"{hit.score:.4f}") for hit in found.hits],
        )
    index = result.index
    how = "every one compared"
    if not index.exact:
        how = (
            f"{index.lists[0]} of {index.lists[1]} lists looked into, which finds "
            f"{index.recall:.1%} of the true neighbours of sampled rows"
        )
    print_line(f"cosine similarity with {counted(index.rows, 'row')}, {how}")
    if result.sheet:
        print_line(f"contact sheet: {result.sheet}")


@command(show=show)
def search(
    images: Images,
    index: Annotated[str, typer.Option(help="Folder that hrvlm embed has written.")],
    top: Annotated[int, typer.Option(help="Hits for each image.")] = 10,
    by: Annotated[
        str | None,
        typer.Option(help="{hrvlm.embed.rows.POOLED}; default: cls where the encoder has one."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare every row also where there are very many.")
    ] = False,
    sheet: Annotated[Path | None, typer.Option(help="Picture of the hits, .png or .jpg.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Page of the first image and its hits, as hrvlm explore's.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--input", help="Where the images are now, if they moved.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it moved.")] = None,
    backend: Backend = "auto",
    device: Device = None,
    fetch: Fetch = False,
) -> SearchResult:
    """Find images that are like given ones among embedded ones.

    Features are compared by cosine similarity; the encoder is the one that made them. Needs the
    extra `scale` (faiss).
    """
    from ..embed.config import need_extra

    need_extra("pyarrow", "faiss")
    from ..embed.search import Searcher, SearchResult
    from ..images.geometry import positive_int
    from ..inference.inputs import gathered

    positive_int("--top", top)
    with gathered(images, fetch=fetch) as inputs:
        searcher = Searcher(
            index, by, exact=exact, input=source, model=model, backend=backend, device=device
        )
        facts = searcher.manifest.facts
        if facts.random_weights:
            note("note: the weights were random: the features mean nothing")
        found = searcher.search(inputs.paths, top)
        if sheet is not None:
            searcher.write_sheet(sheet, found)
        if page is not None:
            from ..explore.page import PageImage, write_page

            shown = [
                PageImage(name, picture, features, note=score)
                for name, picture, features, score in searcher.patches_of(found[0])
            ]
            title = f"What is like {inputs.paths[0].name}"
            written = write_page(page, shown, title=title, about=f"{facts.name}, {index}")
            note(f"page: {written.path}")
        found = [replace(one, query=inputs.name(Path(one.query))) for one in found]
    return SearchResult(found, searcher.by, searcher.index, facts.random_weights, sheet)
