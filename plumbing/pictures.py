"""PNG files and animations of what somebody else draws."""
import io

import numpy as np

from plumbing import new_figure


def png(draw, *args, size=(8, 3.6), dpi=100, places=None):
    """The bytes of a PNG file of what draw(figure, *args) draws.

    places: a list, in which the first picture leaves where its axes and texts are. The next ones
    take it from there. That saves a third of the time, and nothing jumps in an animation. (savefig
    would draw twice.)
    """
    figure, buffer = new_figure(size), io.BytesIO()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # now, see new_figure()
    draw(figure, *args)
    if len(places or ()) == len(figure.axes + figure.texts):
        figure.set_layout_engine("none")
        for each, place in zip(figure.axes + figure.texts, places, strict=True):
            each.set_position(place)
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(buffer)
    if places == []:
        places += [ax.get_position(original=True) for ax in figure.axes]
        places += [text.get_position() for text in figure.texts]
    return buffer.getvalue()


def animate(paths, movie):
    """At most 40 of the pictures as an animation, which pauses at the end."""
    from PIL import Image
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), 40)).astype(int)
    first, *others = (Image.open(paths[n]).convert("RGB") for n in chosen)
    milliseconds = [250] * len(others) + [3000]
    first.save(movie, save_all=True, append_images=others, duration=milliseconds, loop=0)


def log_ticks(ax):
    """Labelled ticks on a logarithmic axis, over a fraction of a decade or over many."""
    from matplotlib.ticker import AutoLocator, LogLocator
    low, high = ax.get_ylim()
    narrow, power = high < 4 * low, 10 ** np.floor(np.log10(low))
    if not narrow:  # begin at a tick, so that what is below the lowest one can be read, too
        low = max((power * step for step in (1, 2, 5) if power * step <= low), default=low)
        ax.set_ylim(low, high)
    decades = LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,))
    ax.yaxis.set(major_locator=AutoLocator() if narrow else decades,
                 major_formatter="{x:g}", minor_formatter="")
