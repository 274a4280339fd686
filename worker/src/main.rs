//! `terrace-worker`: one prefill or decode worker.

use clap::Parser;
use terrace_worker::service::{Cli, run};
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let (role, args) = Cli::parse().role.split();
    // The model's own threads compute; these only wait for sockets.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(role, args))
}
