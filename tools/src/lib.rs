//! The `terrace` program: runs a node in the foreground, shows what is where,
//! and measures.

mod admin;
mod bench;
mod block;
mod chart;
pub mod cli;
mod connect;
mod curve;
mod daemon_config;
mod doctor;
mod explain;
mod home;
mod inspect;
mod model;
mod output;
mod prefix;
mod scrub;
mod sim;
mod up;
