"""Make the artwork data set: five openly licensed drawings of each concept, as small RGB pictures on white.

    python -m diffpref.emoji_world.build --out artwork.parquet --size 32

fetches the packages below from the npm registry (with `npm pack`, so your npm settings apply), finds each concept's
drawing by its Unicode code point and writes one parquet row per picture, with the licence and the source it came
from. Needs the
`artwork` extra (resvg-py) and npm. Only MIT and Apache-2.0 artwork is used; NOTICE carries the upstream texts.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

CONCEPTS = Path(__file__).parent / "data" / "concepts.json"
SUPERSAMPLE = 8  # vector art is drawn this many times larger, then reduced: cleaner edges than drawing at 32 pixels


@dataclass(frozen=True)
class ArtworkPackage:
    """One style: the npm package that holds its drawings, and the licence of the *artwork* (not of the repackaging)."""

    style: str
    package: str
    version: str
    license: str
    author: str


PACKAGES = (
    ArtworkPackage("3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft Corporation"),
    ArtworkPackage("flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation"),
    ArtworkPackage("line art", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Corporation"),
    ArtworkPackage("cartoon", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc"),
    ArtworkPackage("retro", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc"),
)
STYLES = tuple(p.style for p in PACKAGES)


def load_concepts(core_only: bool = True) -> list[dict]:
    """The curated concepts (`name`, `group`, `codepoint`, `core`), in a fixed order."""
    return [c for c in json.loads(CONCEPTS.read_text()) if c["core"] or not core_only]


def fetch(package: ArtworkPackage, folder: Path) -> Path:
    """Download one package's tarball into `folder`, once. Raises RuntimeError with npm's own words when that fails."""
    archive = folder / f"{package.package.strip('@').replace('/', '-')}-{package.version}.tgz"
    if archive.exists():
        return archive
    name = f"{package.package}@{package.version}"
    try:
        result = subprocess.run(["npm", "pack", "--silent", name], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("npm is needed to fetch the artwork packages; install Node.js") from error
    if result.returncode or not archive.exists():
        raise RuntimeError(f"npm pack {name} failed: {result.stderr.strip() or result.stdout.strip()}")
    return archive


def flatten(image: Image.Image, size: int) -> Image.Image:
    """RGBA artwork of any size -> square RGB picture on white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def webp_artwork(archive: tarfile.TarFile, size: int) -> Callable[[dict], Image.Image | None]:
    """Drawings stored as one WebP file per code point."""
    names = {Path(name).stem.replace("-fe0f", ""): name for name in archive.getnames() if name.endswith(".webp")}

    def draw(concept: dict) -> Image.Image | None:
        name = names.get(concept["codepoint"].lower())
        return flatten(Image.open(archive.extractfile(name)), size) if name else None

    return draw


def svg_artwork(archive: tarfile.TarFile, size: int) -> Callable[[dict], Image.Image | None]:
    """Drawings stored as SVG bodies in an icon set's JSON, found by its code point table or, where that is empty,
    by name."""
    import resvg_py  # here, because only this command needs it

    icons = json.load(archive.extractfile("package/icons.json"))
    slugs = {
        code.replace("-fe0f", ""): slug for code, slug in json.load(archive.extractfile("package/chars.json")).items()
    }

    def draw(concept: dict) -> Image.Image | None:
        slug = slugs.get(concept["codepoint"].lower(), concept["name"].replace(" ", "-"))
        icon = icons["icons"].get(icons.get("aliases", {}).get(slug, {}).get("parent", slug))
        if icon is None:
            return None
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        body = re.sub("currentColor", "#000000", icon["body"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
        pixels = size * SUPERSAMPLE
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels))
        return flatten(Image.open(io.BytesIO(png)), size)

    return draw


def render(package: ArtworkPackage, archive: Path, concepts: list[dict], size: int) -> Iterator[dict]:
    """Rows of the data set for one style; a concept the package lacks is left out."""
    with tarfile.open(archive) as tar:
        draw = (webp_artwork if "3d" in package.package else svg_artwork)(tar, size)
        for concept in concepts:
            image = draw(concept)
            if image is None:
                continue
            png = io.BytesIO()
            image.save(png, "PNG", optimize=True)
            yield {
                "image": {"bytes": png.getvalue(), "path": None},
                "concept": concept["name"],
                "style": package.style,
                "group": concept["group"],
                "codepoint": concept["codepoint"],
                "license": package.license,
                "author": package.author,
                "source": f"{package.package}@{package.version}",
            }


def build(out: Path, size: int, core_only: bool, cache: Path) -> int:
    """Write the data set to `out` (parquet, readable with `datasets`) and return its number of pictures."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    cache.mkdir(parents=True, exist_ok=True)
    concepts = load_concepts(core_only)
    rows = [row for p in tqdm(PACKAGES, "styles") for row in render(p, fetch(p, cache), concepts, size)]
    text = {key: Value("string") for key in rows[0] if key != "image"}
    out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features({"image": ImageFeature(), **text})).to_parquet(out)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels")
    parser.add_argument("--all-concepts", action="store_true", help="every curated concept, not only the 109 core ones")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "diffpref-artwork", help="where the packages go"
    )
    args = parser.parse_args()
    count = build(args.out, args.size, not args.all_concepts, args.cache)
    print(f"{count} pictures of {args.size}x{args.size} pixels in {args.out}")


if __name__ == "__main__":
    main()
