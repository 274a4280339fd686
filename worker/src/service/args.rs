//! What a worker process is told on its command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use terrace_proto::v1::WorkerRole;

use crate::model::ComputeDevice;

/// A worker of Terrace: computes prompts and generates tokens over leased blocks.
#[derive(Debug, Parser)]
#[command(name = "terrace-worker", version)]
pub struct Cli {
    /// What the worker is for.
    #[command(subcommand)]
    pub role: Role,
}

/// What the worker is for.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// Compute prompts and seal their blocks.
    Prefill(WorkerArgs),
    /// Generate tokens; compute what is missing of a prompt.
    Decode(WorkerArgs),
}

impl Role {
    /// The role's options and its name on the wire.
    pub fn split(self) -> (WorkerRole, WorkerArgs) {
        match self {
            Self::Prefill(args) => (WorkerRole::Prefill, args),
            Self::Decode(args) => (WorkerRole::Decode, args),
        }
    }
}

/// Options of both roles.
#[derive(Clone, Debug, Args)]
pub struct WorkerArgs {
    /// Model in GGUF format.
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// Unique name of this worker, for example prefill-0.
    #[arg(long)]
    pub name: String,
    /// Address to serve gRPC on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// Address to serve /metrics and /healthz on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS")]
    pub metrics_listen: SocketAddr,
    /// Lane socket of terraced. Without it, every prompt is computed.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// gRPC address of terraced, to report load to, for example http://127.0.0.1:7400.
    #[arg(long, value_name = "URL")]
    pub grpc: Option<String>,
    /// Tenant to act for.
    #[arg(long, default_value = "default")]
    pub tenant: String,
    /// Secret of the tenant.
    #[arg(long, default_value = "", env = "TERRACE_TOKEN", hide_env_values = true)]
    pub token: String,
    /// Where to compute: cpu, or a CUDA device, for example cuda:0. There is no falling back. Blocks
    /// lie in its memory where the daemon owns some. (host-only runs the kernels on the processor, for tests.)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: ComputeDevice,
    /// Threads that compute; 0 means all processors.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Requests at once; twice as many more may wait.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub requests: u32,
    /// Seconds that running requests get after a request to stop.
    #[arg(long, default_value_t = 10)]
    pub drain_seconds: u64,
}
