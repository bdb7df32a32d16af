#!/usr/bin/env python3
"""Tables of simulate.py as figures: throughput over nodes, and efficiency beside it. SVG written by hand; standard library only.

    tests/bench/plot_scaling.py docs/scaling/full.tsv "title" > docs/scaling/full.svg"""
import csv
import math
import re
import sys
from xml.sax.saxutils import escape

# Colours of Okabe and Ito, told apart by everyone; each with a mark and a dash of its own, for print.
STYLES = {"replicas": ("#000000", "circle", ""), "pp": ("#0072b2", "square", "7 3"), "ep": ("#d55e00", "diamond", ""),
          "pp, replicas": ("#009e73", "up", "2 3"), "ep, replicas": ("#cc79a7", "down", "9 3 2 3"), "ep, stages": ("#e69f00", "cross", "4 3")}
WIDTH, HEIGHT, TOP, BOTTOM = 1060, 500, 92, 64
PANELS = [(86, 430), (632, 400)]  # left edge, width


def style_of(name):
    """The same for a layout in all figures, whatever its numbers."""
    return STYLES[re.sub(r" \d+", "", name)]


def number(v):
    return f"{v:,.0f}" if v >= 1 else f"{v:g}"


class Axes:
    def __init__(self, left, width, x, y, log_y):
        self.left, self.width, self.x, self.y, self.log_y = left, width, x, y, log_y

    def px(self, v):
        a, b = (math.log2(t) for t in self.x)
        return self.left + self.width * (math.log2(v) - a) / (b - a)

    def py(self, v):
        f = math.log10 if self.log_y else float
        a, b = (f(t) for t in self.y)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (f(v) - a) / (b - a)


def text(x, y, s, size=13, anchor="middle", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {more}>{escape(s)}</text>'


def line(x1, y1, x2, y2, colour, width=1.0, dash=""):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"'
            + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")


def mark(x, y, kind, colour):
    r = 4.5
    shapes = {"square": [(-r, -r), (r, -r), (r, r), (-r, r)], "diamond": [(0, -r * 1.3), (r * 1.3, 0), (0, r * 1.3), (-r * 1.3, 0)],
              "up": [(0, -r * 1.2), (r * 1.1, r), (-r * 1.1, r)], "down": [(0, r * 1.2), (r * 1.1, -r), (-r * 1.1, -r)]}
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}"/>'
    if kind == "cross":
        return line(x - r, y - r, x + r, y + r, colour, 2.2) + line(x - r, y + r, x + r, y - r, colour, 2.2)
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shapes[kind])}" fill="{colour}"/>'


def frame(axes, ticks_y, label_y, title, label_x="nodes", name_x=str):
    out, bottom, right = [], HEIGHT - BOTTOM, axes.left + axes.width
    for v in ticks_y:
        y = axes.py(v)
        out += [line(axes.left, y, right, y, "#dddddd"), text(axes.left - 8, y + 4.5, number(v) + ("" if axes.log_y else " %"), anchor="end")]
    k = axes.x[0]
    while k <= axes.x[1]:
        out += [line(axes.px(k), bottom, axes.px(k), bottom + 5, "#333333"), text(axes.px(k), bottom + 20, name_x(k))]
        k *= 2
    out += [line(axes.left, bottom, right, bottom, "#333333"), line(axes.left, TOP, axes.left, bottom, "#333333"),
            text((axes.left + right) / 2, bottom + 44, label_x), text((axes.left + right) / 2, TOP - 12, title, 14, more='font-weight="bold"')]
    x, y = axes.left - (66 if axes.log_y else 62), (TOP + bottom) / 2
    return out + [text(x, y, label_y, more=f'transform="rotate(-90 {x:.1f} {y:.1f})"')]


def curve(axes, points, style):
    colour, kind, dash = style
    at = [(axes.px(x), axes.py(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>"] + [
        mark(x, y, kind, colour) for x, y in at]


def decades(low, high):
    ticks, v = [], 10.0 ** math.floor(math.log10(low))
    while v < high * 1.001:
        ticks += [v * m for m in (1, 2, 5) if low * 0.999 <= v * m <= high * 1.001]
        v *= 10
    return ticks


def main():
    with open(sys.argv[1]) as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    alone = next(float(r["simulated"]) for r in rows if r["nodes"] == "1")
    curves = {}
    for r in rows:
        curves.setdefault(r["set"], []).append((int(r["nodes"]), float(r["simulated"])))
    most_x = max(x for c in curves.values() for x, _ in c)
    speeds = [y for c in curves.values() for _, y in c]
    low, high = min(speeds) * 0.8, max(max(speeds), alone * most_x) * 1.15
    speed = Axes(*PANELS[0], (1, most_x), (low, high), True)
    share = Axes(*PANELS[1], (1, most_x), (0, 105), False)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif" fill="#222222">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', text(PANELS[0][0], 24, sys.argv[2], 16, "start", 'font-weight="bold"')]
    out += frame(speed, decades(low, high), "tokens/s put out, all nodes", "Throughput")
    out += frame(share, range(0, 101, 20), "throughput per node, one node alone = 100 %", "Efficiency")
    out += [line(speed.px(1), speed.py(alone), speed.px(most_x), speed.py(alone * most_x), "#888888", 1.2, "1 4")]
    for name, points in curves.items():
        style = style_of(name)
        out += curve(speed, points, style) + curve(share, [(x, 100 * y / x / alone) for x, y in points], style)
    x = PANELS[0][0]
    for name in curves:
        style = style_of(name)
        out += [line(x, 48, x + 34, 48, style[0], 2, style[2]), mark(x + 17, 48, style[1], style[0]), text(x + 41, 52.5, name, anchor="start")]
        x += 41 + 7 * len(name) + 18
    out += [line(x, 48, x + 34, 48, "#888888", 1.2, "1 4"), text(x + 41, 52.5, "one node × nodes", anchor="start"), "</svg>"]
    print("\n".join(out))


if __name__ == "__main__":
    main()
