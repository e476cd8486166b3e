//! Results for people: tables on the terminal, the HTML page, the comparison of two runs.

mod charts;
pub(crate) mod compare;
mod findings;
#[cfg(test)]
pub(crate) mod fixture;
mod group;
pub(crate) mod html;
mod palette;
pub(crate) mod progress;
pub(crate) mod table;
pub(crate) mod targets;

use std::path::Path;

use crate::results::{self, Results};

/// Prints the results in a file, or writes their page.
///
/// # Errors
/// If the results cannot be read, or the page cannot be written.
pub(crate) fn run(file: &Path, page: Option<&Path>) -> anyhow::Result<()> {
    let results = results::read(file)?;
    match page {
        Some(page) => results::replace(page, &html::page(&results))?,
        None => results.cells.iter().for_each(|cell| table::print_cell(cell, reference(&results))),
    }
    Ok(())
}

/// The system that the others are compared with: the in-process thread if it was measured, else the first.
pub(crate) fn reference(results: &Results) -> &str {
    let measured = |name: &str| {
        results.cells.iter().flat_map(|c| &c.systems).any(|s| s.system == name && !s.samples.is_empty())
    };
    let thread = targets::THREAD.iter().copied().find(|name| measured(name));
    thread
        .or_else(|| results.systems.iter().map(|s| s.name.as_str()).find(|name| measured(name)))
        .unwrap_or("")
}
