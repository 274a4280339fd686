//! Plots as SVG: lines over a logarithmic axis, for replays and miss-ratio curves.

use std::ops::Range;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::{
    BLACK, ChartBuilder, Circle, DrawingArea, IntoDrawingArea, IntoLogRange, LineSeries, PathElement,
    RGBColor, SVGBackend, SeriesLabelPosition, WHITE,
};
use plotters::style::Color;

/// Size of one plot in pixels.
const PLOT: (u32, u32) = (560, 380);
/// Colours that differ for readers who see fewer of them.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(70, 70, 70),
];

/// A named line.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Series {
    /// Its name.
    pub(crate) name: String,
    /// Its points, by x.
    pub(crate) points: Vec<(f64, f64)>,
}

/// Where a legend lies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Corner {
    /// For lines that rise early.
    LowerRight,
    /// For lines that rise late.
    UpperLeft,
}

/// A plot: what it shows and its lines. Points whose x is not above 0 have no place on its axis.
#[derive(Clone, Debug)]
pub(crate) struct Plot {
    /// Above it.
    pub(crate) title: String,
    /// Below it.
    pub(crate) x: &'static str,
    /// Beside it.
    pub(crate) y: &'static str,
    /// Its lines.
    pub(crate) series: Vec<Series>,
    /// Where the legend covers least.
    pub(crate) legend: Corner,
    /// Points are marked: they were measured one by one.
    pub(crate) marked: bool,
}

/// Draws plots in rows of two.
///
/// # Errors
/// When there is nothing to draw.
pub(crate) fn draw(plots: &[Plot]) -> anyhow::Result<String> {
    let columns = u32::try_from(plots.len().clamp(1, 2))?;
    let rows = u32::try_from(plots.len().div_ceil(2).max(1))?;
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (PLOT.0 * columns, PLOT.1 * rows)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| anyhow!("cannot draw: {error}"))?;
        let parts = area.split_evenly((rows as usize, columns as usize));
        for (plot, part) in plots.iter().zip(&parts) {
            draw_one(plot, part).map_err(|error| anyhow!("cannot draw {}: {error}", plot.title))?;
        }
        area.present().map_err(|error| anyhow!("cannot draw: {error}"))?;
    }
    Ok(text)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw_one(plot: &Plot, area: &Area<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let (x, y) = ranges(&plot.series);
    let mut chart = ChartBuilder::on(area)
        .caption(&plot.title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(x.log_scale(), y)?;
    chart
        .configure_mesh()
        .x_desc(plot.x)
        .y_desc(plot.y)
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| short(*value))
        .label_style(("sans-serif", 12))
        .draw()?;
    for (series, colour) in plot.series.iter().zip(COLOURS.iter().cycle()) {
        let points = || series.points.iter().copied().filter(|&(x, _)| x > 0.0);
        let line = LineSeries::new(points(), colour.stroke_width(2));
        let colour = *colour;
        chart
            .draw_series(line)?
            .label(&series.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        if plot.marked {
            chart.draw_series(points().map(|point| Circle::new(point, 3, colour.filled())))?;
        }
    }
    chart
        .configure_series_labels()
        .position(match plot.legend {
            Corner::LowerRight => SeriesLabelPosition::LowerRight,
            Corner::UpperLeft => SeriesLabelPosition::UpperLeft,
        })
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 12))
        .draw()?;
    Ok(())
}

/// Axes that hold every point: x on a logarithmic scale, y from 0.
fn ranges(series: &[Series]) -> (Range<f64>, Range<f64>) {
    let points = || series.iter().flat_map(|series| &series.points).filter(|(x, _)| *x > 0.0);
    let low = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let high = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points().map(|point| point.1).fold(0.0, f64::max);
    let x = if low < high { low..high } else { low.min(1.0) * 0.5..high.max(1.0) * 2.0 };
    (x, 0.0..if top > 0.0 { top * 1.05 } else { 1.0 })
}

/// A number on an axis.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{value:.0e}"),
        size if size >= 10.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that no viewer opens, or a line that is missing, would be worse than no plot.
    #[test]
    fn a_plot_holds_its_lines() {
        let series =
            |name: &str| Series { name: name.to_owned(), points: vec![(0.0, 1.0), (0.1, 5.0), (50.0, 37.0)] };
        let plot = Plot {
            title: "conversation: hits & more".to_owned(),
            x: "share",
            y: "hits",
            series: vec![series("lru"), series("duel")],
            legend: Corner::LowerRight,
            marked: true,
        };
        let text = draw(&[plot.clone(), plot]).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("hits &amp; more"), "text is escaped");
        assert_eq!(text.matches(">\nlru\n<").count(), 2);
        assert_eq!(text.matches("<circle").count(), 8, "two points of two lines of two plots have a place");
    }

    /// Axes of one point, or of none, must still be axes.
    #[test]
    fn axes_are_never_empty() {
        for points in [vec![], vec![(3.0, 0.0)], vec![(1.0, 2.0), (4.0, 8.0)]] {
            let (x, y) = ranges(&[Series { name: String::new(), points }]);
            assert!(x.start > 0.0 && x.start < x.end && x.end.is_finite(), "{x:?}");
            assert!(y.start < y.end);
        }
    }
}
