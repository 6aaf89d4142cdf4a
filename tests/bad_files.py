"""Files of rows that cannot be read as they stand, with what the message must say, and files of text that can."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
LINE = json.dumps(ROW) + "\n"
HEAD = "prompt,chosen,rejected\n"


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


ROWS = pa.Table.from_pylist([ROW] * 100)
PARQUET, ARROW = parquet(ROWS), arrow(ROWS)


def flipped(content: bytes, start: int, count: int = 30) -> bytes:
    return content[:start] + b"\xff" * count + content[start + count :]


# Name of the file → its content, and words of the message.
BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "twice.csv": ("prompt,chosen,chosen,rejected\na,b,c,d\n", "2 columns named 'chosen'; remove or rename"),
    "semicolons.csv": (HEAD.replace(",", ";") + "a;b;c\n", "one column, 'prompt;chosen;rejected'; separate .* sep=';'"),
    "tabs.csv": (HEAD.replace(",", "\t") + "a\tb\tc\n", r"one column, .*sep='\\t'"),
    "bars.csv": (HEAD.replace(",", "|") + "a|b|c\n", r"one column, .*sep='\|'"),
    "utf16.csv": ((HEAD + "a,b,c\n").encode("utf-16"), "UnicodeDecodeError.* UTF-8"),
    "latin.csv": ((HEAD + "ä,b,c\n").encode("latin-1"), "UnicodeDecodeError.* UTF-8"),
    "quote.csv": (HEAD + 'a,"b,c\nd,e,f\n', "row 0: it has 2 cells for the 3 columns .* quotes"),
    "last quote.csv": (HEAD + 'a,b,"c\nd,e,f\n', "EOF inside string|a quote"),
    "longer.csv": (HEAD + "a,b,c,d\n", "row 0: it has 4 cells for the 3 columns"),
    "longer later.csv": (HEAD + "a,b,c\na,b,c,d\n", "row 1: it has 4 cells for the 3 columns"),
    "shorter.csv": (HEAD + "a,b\n", "row 0: it has 2 cells for the 3 columns"),
    "shorter later.csv": (HEAD + "a,b,c\n\na\n", "row 1: it has 1 cells for the 3 columns"),
    "header.csv": (HEAD, "holds no rows"),
    "blank.csv": ("\n\n", "holds no rows"),
    "page.csv": ("<html>\n<body>\n", "found the columns <html>"),
    "weight.csv": ("prompt,chosen,rejected,weight\na,b,c,2\na,b,c,NA\n", "row 1: column 'weight': .* got 'NA'; give"),
    "empty weight.csv": ("prompt,chosen,rejected,weight\na,b,c,\n", "row 0: column 'weight': .* got ''; give"),
    "infinite.csv": ("prompt,chosen,rejected,weight\na,b,c,inf\n", "row 0: column 'weight': .* got inf"),
    "offset.csv": ("prompt,chosen,rejected,offset\na,b,c,x\n", "row 0: column 'offset': .* got 'x'"),
    "positive.csv": (
        "prompt,chosen,rejected,ref_chosen_logps,ref_rejected_logps\na,b,c,-1,2\n",
        "row 0: column 'ref_rejected_logps': 2.0 is above 0",
    ),
    "tokens.csv": ("prompt_ids,chosen_ids,rejected_ids\n[1],[2],[3]\n", r"row 0: column 'prompt_ids': .*'\[1\]'"),
    "cut.jsonl": (LINE + LINE[:20], "JSON parse error.* row 1"),
    "cut.json": ("[" + LINE + ",", "JSONDecodeError"),
    "scalars.jsonl": ("1\n2\n", r"begins with '1\\n2\\n', which is no row; give one JSON object per line"),
    "null.jsonl": ("null\n" + LINE, "begins with 'null"),
    "later null.jsonl": (LINE + "null\n", "row 1: column 'chosen': .*None"),
    "later scalar.jsonl": (LINE + "5\n", "cannot be read"),
    "text.json": ('"abc"', "begins with .*, which is no row"),
    "number.json": ("5", "begins with '5', which is no row"),
    "page.jsonl": ("<html>", "begins with '<html>', which is no row"),
    "arrays.jsonl": ("[1, 2]\n[3]\n", "Extra data"),
    "numbers.json": ("[1, 2]", "row 0: expected a JSON object, got 1"),
    "null in a list.json": (f"[{LINE},null]", "row 1: expected a JSON object, got None"),
    "keys twice.json": (
        '[{"prompt": "a", "chosen": "b", "chosen": "x", "rejected": "c"}]',
        "'chosen' is specified twice",
    ),
    "more.json": (f"[{LINE}] x", "Extra data"),
    "comma.json": (f"[{LINE},]", "JSONDecodeError|Expecting value"),
    "nan.json": ('[{"prompt": "a", "chosen": "b", "rejected": "c", "weight": NaN}]', "row 0: column 'weight'"),
    "nested.json": (json.dumps({"data": [ROW]}), "found the columns data"),
    "nothing.json": ("[]", "holds no rows|no rows"),
    "no columns.jsonl": ("{}\n{}\n", "holds no rows|no rows"),
    "blank.jsonl": (" \n\n", "holds no rows"),
    "mixed.jsonl": (LINE + json.dumps({**ROW, "chosen": 5}) + "\n", "row 1: column 'chosen': .*int 5"),
    "mixed lists.jsonl": (LINE + json.dumps({**ROW, "chosen": [1]}) + "\n", r"row 1: column 'chosen': .*\[1\]"),
    "lacks a key.jsonl": (LINE + '{"prompt": "a", "chosen": "b"}\n', "row 1: column 'rejected': .*None"),
    "keys twice.jsonl": ('{"prompt": "a", "chosen": "b", "chosen": "x", "rejected": "c"}\n', "specified twice"),
    "nan.jsonl": (LINE[:-2] + ', "weight": NaN}\n', "row 0: column 'weight': .* got nan"),
    "dates.jsonl": (LINE.replace('"b"', '"2024-01-01"'), "row 0: column 'chosen': .*datetime"),
    "deep.jsonl": (LINE[:-2] + ', "x": ' + "[" * 3000 + "]" * 3000 + "}\n", "RecursionError|ArrowInvalid"),
    "deep prompt.jsonl": ('{"prompt": ' + "[" * 300 + "]" * 300 + ', "chosen": "b", "rejected": "c"}\n', "Recursion"),
    "surrogate.jsonl": (LINE.replace('"a"', '"\\ud800"'), "surrogate"),
    "large ids.jsonl": (
        '{"prompt_ids":[1],"chosen_ids":[99999999999999999999],"rejected_ids":[2]}\n',
        "'chosen_ids'.*1e.20",
    ),
    "utf16.jsonl": (LINE.encode("utf-16"), "UnicodeDecodeError.* UTF-8"),
    "latin.jsonl": (LINE.replace("b", "ä").encode("latin-1"), "UnicodeDecodeError.* UTF-8"),
    "rows.jsonl.gz": (gzip.compress(LINE.encode()), "ends in '.gz'; the file formats are"),
    "empty.parquet": (b"", "is an empty file"),
    "text.parquet": (b"hello world", "magic"),
    "magic.parquet": (b"PAR1garbagePAR1", "ArrowInvalid"),
    "cut.parquet": (PARQUET[:-20], "magic"),
    "half.parquet": (PARQUET[: len(PARQUET) // 2], "magic"),
    "flipped.parquet": (flipped(PARQUET, 30), "OSError|ArrowInvalid"),
    "no rows.parquet": (parquet(ROWS.slice(0, 0)), "no rows|BatchSize"),
    "no columns.parquet": (parquet(pa.table({})), "no rows|BatchSize"),
    "no text.parquet": (
        parquet(pa.table({**dict.fromkeys(("prompt", "chosen"), ["a"]), "rejected": pa.array([b"\xff"])})),
        "row 0: column 'rejected': .*bytes",
    ),
    "latin.parquet": (
        parquet(
            pa.table({**dict.fromkeys(("prompt", "chosen"), ["a"]), "rejected": pa.array([b"\xe4"]).view(pa.string())})
        ),
        "UnicodeDecodeError.* UTF-8|utf-8",
    ),
    "text.arrow": (b"hello world", "ArrowInvalid"),
    "cut.arrow": (ARROW[: len(ARROW) // 2], "OSError|ArrowInvalid"),
    "flipped.arrow": (flipped(ARROW, 8), "OSError|ArrowInvalid"),
    "notes.txt": ("hello", "ends in '.txt'; the file formats are"),
}
# Name of the file → its content, and the rows' texts.
GOOD_FILES: dict[str, tuple[str | bytes, list[tuple[str, str, str]]]] = {
    "text.csv": (
        HEAD + "NA,NULL,nan\n42,True,None\n2024-01-01,1e5,007\n",
        [("NA", "NULL", "nan"), ("42", "True", "None"), ("2024-01-01", "1e5", "007")],
    ),
    "numbers.csv": (HEAD + "1,2,3\n4,5.0,-6\n", [("1", "2", "3"), ("4", "5.0", "-6")]),
    "truth.csv": (HEAD + "True,False,true\n", [("True", "False", "true")]),
    "empty cells.csv": (HEAD + 'a,,c\n"",b,c\n', [("a", "", "c"), ("", "b", "c")]),
    "blank lines.csv": (HEAD + "\na,b,c\n\n", [("a", "b", "c")]),
    "quotes.csv": (HEAD + '"a,1","b\n2","c""3"\n', [("a,1", "b\n2", 'c"3')]),
    "mark.csv": (b"\xef\xbb\xbf" + (HEAD + "ä,b,c\n").encode(), [("ä", "b", "c")]),
    "index.csv": ("," + HEAD + "0,a,b,c\n", [("a", "b", "c")]),
    "long.csv": (HEAD + f"{'a' * 200_000},b,c\n", [("a" * 200_000, "b", "c")]),
    "packed.csv": (gzip.compress((HEAD + "a,b,c\n").encode()), [("a", "b", "c")]),
    "mark.jsonl": (b"\xef\xbb\xbf" + LINE.encode(), [("a", "b", "c")]),
    "blank lines.jsonl": ("\n" + LINE + "\n\n" + LINE, [("a", "b", "c")] * 2),
    "object.json": (json.dumps(ROW), [("a", "b", "c")]),
    "indented.json": (json.dumps([ROW, ROW], indent=2), [("a", "b", "c")] * 2),
}
