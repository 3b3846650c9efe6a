"""URLs of remote data. Uses no framework."""

import re

from fastsimclr.errors import UserError

_queries: dict[str, str] = {}  # of this process, by URL without query


def is_url(path: str) -> bool:
    """Return whether `path` names remote data: s3://, gs://, hf://, https:// or http://."""
    return re.match(r"(s3|gs|hf|https?)://", path) is not None


def is_pattern(path: str) -> bool:
    """Return whether a path or URL stands for several files: by {000..127}, {a,b}, or globs (* ? [])."""
    return any(c in path for c in ("{*" if path.startswith("http") else "{*?["))  # http://[::1]/ is none


def without_query(url: str) -> str:
    """Return the URL without its query, which may be a signature: it is kept in memory, for `query_of`.

    Only the query's owner may see it, so it is never part of an option, a name, a message or a file. Any other text is
    returned as it is. Raises UserError, without quoting the URL, if it has a user name or a password.
    """
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    if "@" in host:
        raise UserError(
            f"data: got a URL with a user name or password ({scheme}://…@{host.rpartition('@')[2]}), expected none: "
            "leave credentials to the environment, ~/.aws, ~/.netrc or a login, where the libraries find them"
        )
    if not scheme.startswith("http"):  # ? stands for any character in their names
        return url
    url, question, query = url.partition("?")
    if question:
        _queries[url] = question + query
    return url


def query_of(url: str) -> str:
    """Return the query, with its question mark, with which this process was given the URL, or nothing."""
    return _queries.get(url, "")


def redacted(text: str) -> str:
    """Return a text such as an error's message or a command without the queries and credentials of its URLs."""
    text = re.sub(r"(\w+://)[^\s/@'\"]+@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
