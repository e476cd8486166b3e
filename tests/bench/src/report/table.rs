//! Results on a terminal.

use std::io::IsTerminal;

use comfy_table::{Attribute, Cell as Field, CellAlignment, Color, Table, presets};

use crate::metric::times;
use crate::results::{Cell, Metric};
use crate::stats::Estimate;

/// Columns of metrics that fit into 120 characters beside the headline metric.
const MORE_METRICS: usize = 6;

/// Prints a cell: a line per system, the headline metric with its spread and its ratio to `reference`, then the others.
///
/// Best values are marked. Colours only on a terminal, and not if `NO_COLOR` is set.
pub(crate) fn print_cell(cell: &Cell, reference: &str) {
    println!("{}\n", cell_text(cell, reference, use_colour()));
}

/// Whether standard output is a terminal whose user has not asked for plain text.
pub(crate) fn use_colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

fn cell_text(cell: &Cell, reference: &str, colour: bool) -> String {
    let Some((&headline, more)) = cell.headline.split_first() else { return cell.id.clone() };
    let more = &more[..more.len().min(MORE_METRICS)];
    let mut table = plain_table(colour);
    let mut header = vec![String::new(), headline.short().to_owned(), "middle half".to_owned()];
    header.push(format!("vs {reference}"));
    header.extend(more.iter().map(|m| m.short().to_owned()));
    table.set_header(header.iter().map(|h| dim(Field::new(h), colour)));
    let columns = header.len();
    let mut notes = String::new();
    for series in &cell.systems {
        let summary = |metric| cell.summary(&series.system, metric);
        if !series.note.is_empty() {
            notes.push_str(&format!("\n  {}: {}", series.system, series.note));
        }
        let Some(spread) = summary(headline) else { continue };
        let mut row = vec![Field::new(&series.system), value(cell, headline, spread.median, colour)];
        row.push(dim(
            Field::new(format!("{}–{}", headline.format(spread.p25), headline.format(spread.p75))),
            colour,
        ));
        row.push(if series.system == reference {
            dim(Field::new("reference"), colour)
        } else {
            ratio(headline, cell.ratio(&series.system, reference, headline), colour)
        });
        row.extend(more.iter().map(|&metric| {
            summary(metric).map_or_else(|| Field::new("-"), |s| value(cell, metric, s.median, colour))
        }));
        table.add_row(row);
    }
    align(&mut table, 1..columns);
    let id = if colour { format!("\x1b[1m{}\x1b[0m", cell.id) } else { cell.id.clone() };
    format!("{id}  ({}, {})\n{}{notes}", headline.label(), headline.better().label(), trimmed(&table))
}

/// A median, marked if no other system's is better.
fn value(cell: &Cell, metric: Metric, median: f64, colour: bool) -> Field {
    let text = metric.format(median);
    if cell.best(metric) != Some(median) {
        return Field::new(text);
    }
    let field = Field::new(format!("*{text}"));
    if colour { field.fg(Color::Green).add_attribute(Attribute::Bold) } else { field }
}

fn ratio(metric: Metric, ratio: Option<Estimate>, colour: bool) -> Field {
    let Some(ratio) = ratio else { return Field::new("-") };
    let field = Field::new(ratio_text(&ratio));
    if !colour || !ratio.excludes(1.0) {
        return field;
    }
    field.fg(if metric.better().than(ratio.value, 1.0) { Color::Green } else { Color::Red })
}

/// "0.98x (0.97–0.99)".
pub(crate) fn ratio_text(ratio: &Estimate) -> String {
    let ends = [ratio.low, ratio.high].map(|end| times(end).trim_end_matches('x').to_owned());
    format!("{} ({}–{})", times(ratio.value), ends[0], ends[1])
}

/// A table without lines.
pub(crate) fn plain_table(colour: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    table
}

pub(crate) fn align(table: &mut Table, columns: impl Iterator<Item = usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// The table's text without blanks at the ends of its lines.
pub(crate) fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

fn dim(field: Field, colour: bool) -> Field {
    if colour { field.add_attribute(Attribute::Dim) } else { field }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    fn cell(id: &str) -> Cell {
        fixture::results(5).cell(id).unwrap().clone()
    }

    #[test]
    fn a_cell_fits_the_terminal_and_marks_the_best() {
        for cell in &fixture::results(5).cells {
            let text = cell_text(cell, "thread", false);
            assert!(!text.contains('\x1b'), "{text}");
            for line in text.lines() {
                assert!(line.chars().count() <= 120, "{} characters: {line}", line.chars().count());
            }
        }
        let text = cell_text(&cell("block/null/randread-4k/qd32/q1/poll"), "thread", false);
        let of = |system: &str| {
            text.lines().find(|l| l.trim_start().starts_with(&format!("{system} "))).unwrap().to_owned()
        };
        assert!(of("card-poll").contains('*'), "{text}");
        assert!(of("thread").contains("reference"), "{text}");
        assert!(of("inline").contains("x ("), "{text}");
        assert!(!of("inline").split_whitespace().nth(1).unwrap().contains('*'), "{text}");
    }

    #[test]
    fn colours_only_if_asked_for() {
        let text = cell_text(&cell("block/null/randread-4k/qd32/q1/poll"), "thread", true);
        assert!(text.contains("\x1b["), "{text}");
    }

    #[test]
    fn a_system_that_could_not_run_says_why() {
        let mut cell = cell("block/null/randread-4k/qd32/q1/poll");
        cell.systems[1].samples.clear();
        cell.systems[1].note = "not installed".to_owned();
        let text = cell_text(&cell, "thread", false);
        assert!(text.ends_with(&format!("{}: not installed", cell.systems[1].system)), "{text}");
    }
}
