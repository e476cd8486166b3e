//! The controller and the command against cards and hypervisors that fail on demand.

mod capture;
mod cards;
mod command;
mod create;
mod daemon;
mod life;
mod limits;
mod metadata;
mod restart;
mod security;
mod support;
