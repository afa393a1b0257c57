"""The OpenAPI document as one plain page: no script, nothing loaded, readable offline."""

import html
import json
import re

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; border: 1px solid #8886; padding: .5rem; font-size: 13px; }
td, th { text-align: left; padding: .1rem 1rem .1rem 0; vertical-align: top; }
"""
REFERENCE = re.compile(r"&quot;#/components/schemas/([\w.-]+)&quot;")


def reference_page(openapi: dict) -> str:
    """HTML of all operations, and of the schemas that they name."""
    operations = [
        _operation(method, path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [
        f'<h3 id="{html.escape(name)}">{html.escape(name)}</h3>{_schema(schema)}'
        for name, schema in openapi.get("components", {}).get("schemas", {}).items()
    ]
    title = html.escape(openapi["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        '<p>The same for programs: <a href="/openapi.json">openapi.json</a></p>'
        f"{''.join(operations)}<h2>Schemas</h2>{''.join(schemas)}</body></html>"
    )


def _operation(method: str, path: str, operation: dict) -> str:
    parts = [
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>",
        f"<p>{html.escape(operation.get('description', ''))}</p>",
    ]
    if parameters := operation.get("parameters"):
        rows = [(x["name"], x["in"], json.dumps(x.get("schema", {}))) for x in parameters]
        parts.append(_table(("parameter", "in", "schema"), rows))
    for content in operation.get("requestBody", {}).get("content", {}).values():
        parts.append(f"<p>Body:</p>{_schema(content['schema'])}")
    rows = []
    for status, answer in operation["responses"].items():
        types = [json.dumps(x.get("schema", {})) for x in answer.get("content", {}).values()]
        rows.append((status, answer["description"], " ".join(types)))
    return "".join(parts) + _table(("status", "meaning", "schema"), rows)


def _table(names, rows) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{_linked(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _schema(schema: dict) -> str:
    return f"<pre>{_linked(json.dumps(schema, indent=2, ensure_ascii=False))}</pre>"


def _linked(text: str) -> str:
    """Text whose references to schemas lead to them."""
    return REFERENCE.sub(r'<a href="#\1">\1</a>', html.escape(text))
