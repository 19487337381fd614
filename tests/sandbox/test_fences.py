"""The code of an answer."""

import time

import pytest

from unidiff.sandbox.fences import code_of

F = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("plain", "plain"),
        (f"```python\n{F}```", F),
        (f"Try\n```python\nx = 1\n```\nno:\n```python\n{F}```\nend", F),
        (f"```\n{F}```", F),
        (f"```Python3 title=\"a.py\" {{.numbered}}\n{F}```", F),
        (f"```{{.python}}\n{F}```", F),
        (f"``` py\n{F}``` \n", F),
        (f"~~~python\n{F}~~~", F),
        (f"````python\n{F}# ```\n````", F + "# ```\n"),
        (f"```bash\npip install x\n```\n```python\n{F}```", F),
        (f"```python\n{F}```\n```c++\nint f(int x) {{ return x; }}\n```", F),
        (f"```python\n{F}```\nOutput:\n```\n4\n```", F),
        (f"```\n{F}```\nOutput:\n```\n4\n```", F),
        (f"```\n{F}```\n```text\ndef of it\n```", F),
        (f"```python\n{F}```\nExample:\n```python\nprint(f(2))\n```", F),
        ("```python\ndef g(): pass\n```\n```python\nprint(int(input()))\n```", "print(int(input()))\n"),
        ("```js\nlet x\n```", "let x\n"),
        (f"```python\r\n{F}```\r\nend".replace("\n", "\r\n").replace("\r\r", "\r"), F),
        (F.replace("\n", "\r\n"), F),
        ("1. So:\n   ```python\n   def f(x):\n       return x\n   ```\n", F),
        ("\t```python\n\tdef f(x):\n\t    return x\n\t```\n", F),
        ("```python\n    def f(x):\n        return x\n```\n", F),
        (f"```python\n{F}", F),
        ("```python\ns = '''\n``'''\n```", "s = '''\n``'''\n"),
        ("```python\ns = 'a\x0cb\u2028c'\n```", "s = 'a\x0cb\u2028c'\n"),
        ("```python\n```", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_code_of(text, code):
    assert code_of(text) == code


@pytest.mark.parametrize("part", ["```", "```\n", "```py\nx\n```\n", "`", " ", "x ", "~~~\n```\n", "\n", "    ```\n"])
def test_it_takes_linear_time(part):
    start = time.thread_time()  # of this thread, whatever else the machine does
    code_of(part * (1_000_000 // len(part)))
    assert time.thread_time() - start < 5
