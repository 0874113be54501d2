"""Reads an HTML page strictly: what a browser would repair is an error here."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "link", "img", "br", "hr", "input"}
SVG_EMPTY = {"path", "rect", "circle"}
KNOWN = {
    *("html", "head", "title", "style", "body", "a", "header", "p", "h1", "h2", "code", "b", "dl", "dt", "dd", "div"),
    *("nav", "ul", "li", "main", "section", "figure", "figcaption", "strong", "bdi", "span", "table", "caption"),
    *("thead", "tbody", "tr", "th", "td", "footer", "svg", "desc", "text"),
}
URLS = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}


@dataclass
class Tag:
    name: str
    attributes: dict[str, str]
    text: str = ""
    inside: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """``tags`` in order, each with all text inside; ``errors``: what is not well-formed, or should not be there."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[Tag] = []
        self.errors: list[str] = []
        self.declared = ""
        self._open: list[Tag] = []
        self.feed(html)
        self.close()
        self.errors += [f"<{tag.name}> is not closed" for tag in self._open]
        ids = [tag.attributes["id"] for tag in self.tags if "id" in tag.attributes]
        self.errors += [f"id {name!r} twice" for name in {one for one in ids if ids.count(one) > 1}]
        for tag in self.tags:
            for name in ("aria-labelledby", "aria-describedby"):
                self.errors += [f"no id {one!r}" for one in tag.attributes.get(name, "").split() if one not in ids]
            target = tag.attributes.get("href", "")
            if target.startswith("#") and target[1:] not in ids:
                self.errors.append(f"a link to {target}, which is not there")

    def handle_decl(self, decl: str) -> None:
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.errors.append(f"<{tag}> has an attribute twice: {names}")
        if tag not in VOID | SVG_EMPTY | KNOWN:
            self.errors.append(f"<{tag}> does not belong on the page")
        self.errors += [f"<{tag}> has {name}" for name in names if name.startswith("on")]
        found = Tag(tag, {name: value or "" for name, value in attrs}, inside=[one.name for one in self._open])
        self.tags.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in SVG_EMPTY:
            self.errors.append(f"<{tag}/> is closed in itself")
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1].name != tag:
            self.errors.append(f"</{tag}> where {[one.name for one in self._open][-2:]} are open")
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            tag.text += data

    def all(self, name: str) -> list[Tag]:
        return [tag for tag in self.tags if tag.name == name]

    def section(self, name: str) -> Tag:
        (found,) = [tag for tag in self.all("section") if tag.attributes["id"] == name]
        return found

    @property
    def text(self) -> str:
        return " ".join(self.all("body")[0].text.split())

    @property
    def outside(self) -> list[str]:
        """Every address that the page would load or lead to, other than itself and data in it."""
        found = [tag.attributes[name] for tag in self.tags for name in URLS if name in tag.attributes]
        styles = " ".join(
            [tag.text for tag in self.all("style")] + [tag.attributes.get("style", "") for tag in self.tags]
        )
        found += re.findall(r"url\(([^)]*)\)|@import\s+([^;]*)", styles)
        return [one for one in found if not str(one).startswith(("#", "data:"))]

    def pictures(self) -> list[Image.Image]:
        """The images, decoded."""
        found = []
        for tag in self.all("img"):
            head, _, data = tag.attributes["src"].partition(";base64,")
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            picture.load()
            assert head == f"data:image/{picture.format.lower()}"
            assert picture.size == (int(tag.attributes["width"]), int(tag.attributes["height"]))
            found.append(picture)
        return found


def check(html: str) -> Page:
    """The page, well-formed, alone and readable for everyone; or an AssertionError that says what is not."""
    page = Page(html)
    assert page.errors == []
    assert page.declared == "DOCTYPE html"
    assert page.outside == []
    assert not page.all("script")
    policy = [tag.attributes["content"] for tag in page.all("meta") if "http-equiv" in tag.attributes]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    assert page.all("html")[0].attributes["lang"] == "en"
    assert len(page.all("h1")) == 1 and len(page.all("title")) >= 1 and page.all("title")[0].text.strip()
    assert all(tag.text.strip() for name in ("h1", "h2", "caption", "th", "dt", "a") for tag in page.all(name))
    assert all(tag.attributes.get("alt", "").strip() for tag in page.all("img"))
    assert all(tag.attributes.get("scope") in ("row", "col") for tag in page.all("th"))
    for tag in page.all("svg"):
        assert tag.attributes["role"] == "img" and len(tag.attributes["aria-labelledby"].split()) == 2
    for picture in page.pictures():
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 4, "a picture of nothing"
    return page
