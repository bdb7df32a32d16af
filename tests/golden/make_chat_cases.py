#!/usr/bin/env python3
"""Makes random conversations and renders them with the real chat templates, as transformers would.

    pip install jinja2
    tests/golden/make_chat_cases.py --count 2000 --seed 7 OUT.json     then   chat_golden_test OUT.json
    tests/golden/make_chat_cases.py --count 90 tests/data/chat_extra.json     (what the repository keeps)

A case that the template itself cannot render has "error": true; shoal must refuse it too. Only what shoal renders is made:
no system message in parts (forms A and B would print Python's notation of the list), no tools for the compact form.
"""
import argparse
import json
import os
import random

from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
TEMPLATES = {
    "A": "tests/data/text/golden/chat_template_A.jinja",
    "B": "tests/data/text/golden/chat_template_B.jinja",
    "compact": "share/minnow/chat_template.jinja",
}
WORDS = ["rain", " wind", "Oslo ", "\n", "\t", "7 C", "é", "日本", "😀", "  ", "<|channel>", "<channel|>", "thought\n", "<turn|>",
         "{", "}", "'", '"', "<|\"|>", "a,b", "\u00a0", "\x1f", "\u2003", "\\", ":", "ok."]
KEYS = ["city", "Unit", "unit", "days", "B", "a", "Äpfel", "äpfel", "Zahl", "type", "description", "required", "items", "x_1", "İ0", "_"]
TYPES = ["string", "integer", "number", "boolean", "object", "array", "STRING", "Object", "Array", "null", ["string", "null"], None]


class Maker:
    def __init__(self, rng, form):
        self.r, self.form = rng, form

    def chance(self, p):
        return self.r.random() < p

    def text(self):
        return "".join(self.r.choice(WORDS) for _ in range(self.r.randrange(0, 7)))

    def key(self):
        return self.r.choice([k for k in KEYS if k != "İ0"])

    def scalar(self):
        r = self.r
        return r.choice([self.text(), r.randrange(-10**6, 10**6), 2**53 + 1, True, False, None, 0.1, 1.0, -0.0, 1e16, 1e22,
                         123456789.125, 1.5e-7, 1e-4, 5e-324, 1e100, r.uniform(-1, 1), r.uniform(0, 1e9)])

    def value(self, depth=0):
        r = self.r
        if depth > 2 or self.chance(0.6):
            return self.scalar()
        if self.chance(0.5):
            return [self.value(depth + 1) for _ in range(r.randrange(0, 4))]
        return {self.key(): self.value(depth + 1) for _ in range(r.randrange(0, 4))}

    def schema(self, depth=0):
        r, s = self.r, {}
        if self.chance(0.05):
            return r.choice([True, None, "text", 3, [], 2.5])
        if self.chance(0.9):
            s["type"] = r.choice(TYPES)
        if self.chance(0.6):
            s["description"] = r.choice([self.text(), self.text(), "", 5])
        if self.chance(0.3):
            s["nullable"] = r.choice([True, False, 1])
        if self.chance(0.3):
            s["enum"] = [self.scalar() for _ in range(r.randrange(0, 4))]
        if self.chance(0.3) and depth < 3:
            s["items"] = r.choice([self.schema(depth + 1), self.schema(depth + 1), {}, None, []])
        if self.chance(0.4) and depth < 3:
            s["properties"] = r.choice([self.properties(depth + 1), self.properties(depth + 1), {}, None])
        if self.chance(0.3):
            s["required"] = [self.key() for _ in range(r.randrange(0, 3))]
        if self.chance(0.2):
            s["default"] = self.value()
        if self.chance(0.1):
            s["additionalProperties"] = r.choice([True, False, {}])
        items = list(s.items())
        r.shuffle(items)
        return dict(items)

    def properties(self, depth=0):
        return {self.key(): self.schema(depth) for _ in range(self.r.randrange(0, 4))}

    def tool(self):
        r = self.r
        f = {"name": r.choice(["get_weather", "search", "Rechne"])}
        if self.chance(0.8):
            f["description"] = r.choice([self.text(), None, ""])
        if self.chance(0.8):
            p = {}
            if self.chance(0.9):
                p["type"] = "object"
            if self.chance(0.8):
                p["properties"] = self.properties()
            if self.chance(0.5):
                p["required"] = [self.key() for _ in range(r.randrange(0, 3))]
            f["parameters"] = r.choice([p, p, p, None, {}])
        if self.chance(0.3):
            f["response"] = r.choice([{"type": "object", "description": self.text()}, {"type": "string"}, {}, {"type": "object"}])
        return {"type": "function", "function": f}

    def parts(self):
        kinds = ["text"] * 3 + ([] if self.form == "compact" else ["image", "audio", "video"])
        return [{"type": k, "text": self.text()} if k == "text" else {"type": k}
                for k in (self.r.choice(kinds) for _ in range(self.r.randrange(0, 4)))]

    def content(self):
        return self.parts() if self.chance(0.25) else self.text()

    def calls(self):
        r, out = self.r, []
        for i in range(r.randrange(1, 4)):
            f = {"name": r.choice(["get_weather", "search"])}
            if self.chance(0.9):
                f["arguments"] = r.choice([{self.key(): self.value() for _ in range(r.randrange(0, 4))}, '{"city": "Oslo"}', None, {}])
            c = {"type": "function", "function": f}
            if self.chance(0.9):
                c["id"] = r.choice(["c1", "c2", "c3"])
            out.append(c)
        return out

    def assistant(self):
        m = {"role": "assistant"}
        if self.form == "compact":
            return {**m, "content": self.content()}
        if self.chance(0.8):
            m["content"] = self.r.choice([self.content(), self.text(), None, ""])
        if self.chance(0.5):
            m["tool_calls"] = self.r.choice([self.calls(), self.calls(), [], None])
        if self.chance(0.3):
            m[self.r.choice(["reasoning", "reasoning_content"])] = self.r.choice([self.text(), "", None])
        if self.chance(0.15):
            m["tool_responses"] = [self.response() for _ in range(self.r.randrange(0, 3))]
        return m

    def response(self):
        x = {"response": self.value()} if self.chance(0.9) else {}
        if self.chance(0.8):
            x["name"] = self.r.choice(["get_weather", "search"])
        return x

    def tool_message(self):
        m = {"role": "tool", "content": self.r.choice([self.text(), self.parts(), self.text(), ""])}
        if self.form != "compact" and self.chance(0.1):
            m["content"] = None
        if self.chance(0.8):
            m["tool_call_id"] = self.r.choice(["c1", "c2", "c3"])
        if self.chance(0.5):
            m["name"] = "named"
        return m

    def conversation(self):
        r, messages = self.r, []
        if self.chance(0.3):
            messages.append({"role": r.choice(["system", "developer"]), "content": self.text()})
        for _ in range(r.randrange(0 if messages else 1, 6)):
            kind = r.random()
            if kind < 0.4:
                messages.append({"role": "user", "content": self.content()})
            elif kind < 0.85:
                messages.append(self.assistant())
                while self.chance(0.4):
                    messages.append(self.tool_message())
            elif kind < 0.92:
                messages.append(self.tool_message())
            else:
                messages.append({"role": r.choice(["system", "developer", "model"]), "content": self.text()})
        return messages

    def case(self, i):
        c = {"template": self.form, "name": f"{self.form}-{i}", "messages": self.conversation()}
        if self.form != "compact" and self.chance(0.4):
            c["tools"] = [self.tool() for _ in range(self.r.randrange(0, 3))]
        if self.chance(0.4):
            c["enable_thinking"] = self.chance(0.7)
        if self.chance(0.2):
            c["add_generation_prompt"] = False
        return c


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--count", type=int, default=90)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    forms = {k: env.from_string(open(os.path.join(ROOT, v), encoding="utf-8").read()) for k, v in TEMPLATES.items()}
    rng, cases = random.Random(a.seed), []
    for i in range(a.count):
        form = list(forms)[i % 3]
        case = Maker(rng, form).case(i)
        args = {"messages": case["messages"], "tools": case.get("tools"), "bos_token": "<bos>",
                "add_generation_prompt": case.get("add_generation_prompt", True)}
        if "enable_thinking" in case:
            args["enable_thinking"] = case["enable_thinking"]
        try:
            case["text"] = forms[form].render(**args)
        except Exception:  # whatever the template trips over
            case["error"] = True
        cases.append(case)
    with open(a.out, "w", encoding="utf-8") as f:
        f.write('{"cases": [\n' + ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "\n]}\n")


main()
