//! Settings of a router: the command line, checked once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::caller::Callers;
use crate::engines::spec::{BadSpec, Spec};
use crate::publish::owner::CacheOwner;
use crate::publish::{Media, Publishing};
use crate::zmtp::address::Address;

/// Most daemons that one router follows.
pub const DAEMONS_MAX: usize = 1024;
/// Most engines whose events one router follows.
pub const ENGINES_MAX: usize = 256;
/// Names that are kept if blocks are published.
const NAMES: usize = 1 << 17;

/// Command line of `terrace-router`.
#[derive(Clone, Debug, Parser)]
#[command(name = "terrace-router", version, about = "OpenAI-compatible front door of Terrace")]
pub struct Options {
    /// Address of the HTTP API, /metrics and /healthz.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// gRPC addresses of the daemons, repeated or with commas between; the router reports to the first.
    #[arg(long, default_value = "http://127.0.0.1:7070", env = "TERRACE_ENDPOINT", value_delimiter = ',')]
    pub grpc: Vec<String>,
    /// Unix socket of the first daemon, if it runs on this node.
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// Tenant whose blocks are asked for.
    #[arg(long, default_value = "default")]
    pub tenant: String,
    /// Secret of the tenant.
    #[arg(long, default_value = "", env = "TERRACE_TOKEN", hide_env_values = true)]
    pub token: String,
    /// Name of this router in reports.
    #[arg(long, default_value = "router-0")]
    pub name: String,
    /// Model name that the API shows; the default is the model file's name.
    #[arg(long)]
    pub model_name: Option<String>,
    /// GGUF file to take the tokenizer from; the default is the file that the workers report.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Longest request body in bytes.
    #[arg(long, default_value_t = 4 << 20)]
    pub body_bytes_max: usize,
    /// Most requests in progress; more are answered 429.
    #[arg(long, default_value_t = 512)]
    pub requests_max: usize,
    /// Most requests waiting for a worker; more are answered 429.
    #[arg(long, default_value_t = 256)]
    pub queue_max: usize,
    /// A worker whose prompts take longer than this to compute is sent no other one, in milliseconds, as long as it
    /// has two; requests wait in the router, where they can be overtaken.
    #[arg(long, default_value_t = 1000)]
    pub worker_queue_ms: u64,
    /// Header that names the tenant of a request; a proxy in front should set it. Without it, each API key is a
    /// tenant.
    #[arg(long, value_name = "NAME", default_value = "x-gateway-inference-fairness-id")]
    pub tenant_header: String,
    /// Share of a tenant when requests wait, against 1 for others; may be given several times.
    #[arg(long, value_name = "TENANT=WEIGHT")]
    pub tenant_weight: Vec<String>,
    /// Longest life of one request, in seconds.
    #[arg(long, default_value_t = 600)]
    pub request_seconds_max: u64,
    /// How long a request waits for a worker to appear before it is answered 503, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    pub worker_wait_ms: u64,
    /// How long a request waits for the block index, in milliseconds.
    #[arg(long, default_value_t = 50)]
    pub index_wait_ms: u64,
    /// Memory of the block index in bytes, from 1 MiB; what is coldest is forgotten at it.
    #[arg(long, default_value_t = 512 << 20)]
    pub index_bytes_max: u64,
    /// An engine whose KV events are followed, may be given several times: `name=NAME` with `connect=ENDPOINT`
    /// (and `replay=ENDPOINT`) or `bind=ENDPOINT`; `topic=`, `block=` (tokens of a block, 16), `hash=`
    /// (vllm-sha256-cbor, vllm-xxhash-cbor, sglang, dynamo) and `seed=` if they are not the defaults.
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub engine: Vec<String>,
    /// Blocks whose names are kept, so that other routers can be told of them and ask for them by hashes; about 400
    /// bytes each. The default is 131072 with --publish, else 0, which keeps none.
    #[arg(long)]
    pub names_max: Option<usize>,
    /// Where other routers subscribe to what the daemons hold, as vLLM publishes it.
    #[arg(long, value_name = "ENDPOINT")]
    pub publish: Option<Address>,
    /// Where subscribers ask for what they missed.
    #[arg(long, value_name = "ENDPOINT", requires = "publish")]
    pub publish_replay: Option<Address>,
    /// Topic of what is published.
    #[arg(long, value_name = "TOPIC", default_value = "terrace")]
    pub publish_topic: String,
    /// What tiers are called there.
    #[arg(long, value_enum, default_value_t = Media::Tier)]
    pub publish_media: Media,
    /// Worker that Dynamo is to credit in /dump.
    #[arg(long, value_name = "ID", default_value_t = 0)]
    pub publish_worker: u64,
    /// Dynamo's id of the daemons' memory as a pool: SEMANTICS:SCOPE/DATACENTER/SLOT in hexadecimal.
    #[arg(long, value_name = "ID")]
    pub cache_owner: Option<CacheOwner>,
    /// How long an engine's events may be away before its blocks are forgotten, in seconds.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub engine_lost_seconds: u64,
    /// Most workers that one request is tried on.
    #[arg(long, default_value_t = 4)]
    pub attempts_max: u32,
    /// How long a worker may say nothing in the middle of an answer before another one goes on with it, in
    /// milliseconds. Its first word may take ten times the estimate longer.
    #[arg(long, default_value_t = 30_000)]
    pub stall_ms: u64,
    /// Time in which a first token is wanted, in seconds; a request for which it is not expected in time is
    /// answered 429. A request may say its own by the header `x-first-token-ms`. The default is none.
    #[arg(long, value_name = "SECONDS")]
    pub first_token_seconds_max: Option<f64>,
    /// How freely a request goes to a worker that is nearly as good as the best one. The default spreads equals
    /// only; 0 always takes the first; several routers before the same workers want about 0.05.
    #[arg(long, default_value_t = 0.001)]
    pub temperature: f64,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address of the HTTP API.
    pub listen: SocketAddr,
    /// gRPC addresses of the daemons.
    pub grpc: Vec<String>,
    /// Unix socket of the first daemon.
    pub socket: Option<PathBuf>,
    /// Tenant whose blocks are asked for.
    pub tenant: String,
    /// Secret of the tenant.
    pub token: String,
    /// Name of this router in reports.
    pub name: String,
    /// Model name that the API shows.
    pub model_name: Option<String>,
    /// GGUF file to take the tokenizer from.
    pub model: Option<PathBuf>,
    /// Longest request body.
    pub body_bytes_max: usize,
    /// Most requests in progress.
    pub requests_max: usize,
    /// Most requests waiting for a worker.
    pub queue_max: usize,
    /// Time of computing that a worker is given in advance.
    pub worker_queue: Duration,
    /// How tenants are told apart.
    pub callers: Callers,
    /// Longest life of one request.
    pub request_time_max: Duration,
    /// Longest wait for a worker to appear.
    pub worker_wait: Duration,
    /// Longest wait for the block index.
    pub index_wait: Duration,
    /// Most memory of the block index.
    pub index_bytes_max: u64,
    /// Engines whose events are followed.
    pub engines: Vec<Spec>,
    /// Blocks whose names are kept.
    pub names_max: usize,
    /// How the daemons' blocks are published, if they are.
    pub publishing: Option<Publishing>,
    /// How long an engine's events may be away before its blocks are forgotten.
    pub engine_lost: Duration,
    /// Most workers that one request is tried on.
    pub attempts_max: u32,
    /// Longest silence of a worker in the middle of an answer.
    pub stall: Duration,
    /// Time in which a first token is wanted, if the request does not say its own.
    pub first_token_by: Option<Duration>,
    /// How freely a request goes to a worker that is nearly as good as the best one.
    pub temperature: f64,
}

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BadConfig {
    /// A limit of zero would refuse every request.
    #[error("--{name} is 0, which refuses every request; give at least 1")]
    Zero {
        /// The option.
        name: &'static str,
    },
    /// A temperature that is no number of 0 or more.
    #[error("--temperature is {found}: it must be from 0 to 1")]
    Temperature {
        /// What was given.
        found: f64,
    },
    /// A time in which no first token can come.
    #[error("--first-token-seconds-max is {found}: it must be more than 0")]
    FirstToken {
        /// What was given.
        found: f64,
    },
    /// No daemon, or too many.
    #[error("--grpc names {count} daemons; it must be from 1 to {DAEMONS_MAX}")]
    Daemons {
        /// So many were given.
        count: usize,
    },
    /// A daemon that would be followed twice.
    #[error("--grpc names {found} twice; its blocks would be counted twice")]
    Twice {
        /// The address.
        found: String,
    },
    /// An engine's line that cannot be used.
    #[error("--engine {line}: {error}")]
    Engine {
        /// What was given.
        line: String,
        /// What is wrong with it.
        error: BadSpec,
    },
    /// A listener that other machines could reach.
    #[error(
        "--publish {found} can be reached from other machines, and nothing there is encrypted; give a loopback address"
    )]
    Publish {
        /// The endpoint.
        found: Address,
    },
    /// Too many engines.
    #[error("--engine is there {count} times; at most {ENGINES_MAX} engines are followed")]
    Engines {
        /// So many were given.
        count: usize,
    },
    /// Two engines of one name.
    #[error("--engine names {found} twice")]
    EngineTwice {
        /// The name.
        found: String,
    },
    /// A header name that HTTP does not allow.
    #[error("--tenant-header {found} is no name of a header")]
    TenantHeader {
        /// What was given.
        found: String,
    },
    /// A weight that is none.
    #[error("--tenant-weight {found}: write it like NAME=2, with a weight from 0.01 to 100")]
    TenantWeight {
        /// What was given.
        found: String,
    },
    /// The daemon's address is no URL.
    #[error("--grpc {found} is no address; write it like http://127.0.0.1:7070")]
    Address {
        /// What was given.
        found: String,
    },
}

impl Options {
    /// Checks the limits.
    ///
    /// # Errors
    /// The first setting that cannot be used.
    pub fn check(self) -> Result<Config, BadConfig> {
        let limits = [
            ("body-bytes-max", self.body_bytes_max as u64),
            ("requests-max", self.requests_max as u64),
            ("queue-max", self.queue_max as u64),
            ("request-seconds-max", self.request_seconds_max),
            ("stall-ms", self.stall_ms),
            ("engine-lost-seconds", self.engine_lost_seconds),
            ("attempts-max", u64::from(self.attempts_max)),
        ];
        if let Some((name, _)) = limits.into_iter().find(|(_, limit)| *limit == 0) {
            return Err(BadConfig::Zero { name });
        }
        if !(0.0..=1.0).contains(&self.temperature) {
            return Err(BadConfig::Temperature { found: self.temperature });
        }
        let wanted = self.first_token_seconds_max;
        let first_token_by = wanted.map(Duration::try_from_secs_f64).transpose().ok();
        let Some(first_token_by) = first_token_by.filter(|wanted| *wanted != Some(Duration::ZERO)) else {
            return Err(BadConfig::FirstToken { found: wanted.unwrap_or(0.0) });
        };
        let is_address = |text: &str| {
            text.contains("://") && tonic::transport::Endpoint::from_shared(text.to_owned()).is_ok()
        };
        if let Some(found) = self.grpc.iter().find(|text| !is_address(text)) {
            return Err(BadConfig::Address { found: found.clone() });
        }
        if self.grpc.is_empty() || self.grpc.len() > DAEMONS_MAX {
            return Err(BadConfig::Daemons { count: self.grpc.len() });
        }
        if let Some(found) = (1..self.grpc.len()).find(|&at| self.grpc[..at].contains(&self.grpc[at])) {
            return Err(BadConfig::Twice { found: self.grpc[found].clone() });
        }
        let engines = engines(&self.engine)?;
        let publishing = self.publishing()?;
        Ok(Config {
            listen: self.listen,
            grpc: self.grpc,
            socket: self.socket,
            tenant: self.tenant,
            token: self.token,
            name: self.name,
            model_name: self.model_name,
            model: self.model,
            body_bytes_max: self.body_bytes_max,
            requests_max: self.requests_max,
            queue_max: self.queue_max,
            worker_queue: Duration::from_millis(self.worker_queue_ms),
            callers: Callers::new(&self.tenant_header, &self.tenant_weight)?,
            request_time_max: Duration::from_secs(self.request_seconds_max),
            worker_wait: Duration::from_millis(self.worker_wait_ms),
            index_wait: Duration::from_millis(self.index_wait_ms),
            index_bytes_max: self.index_bytes_max,
            engines,
            names_max: self.names_max.unwrap_or(if publishing.is_some() { NAMES } else { 0 }),
            publishing,
            engine_lost: Duration::from_secs(self.engine_lost_seconds),
            attempts_max: self.attempts_max,
            stall: Duration::from_millis(self.stall_ms),
            first_token_by,
            temperature: self.temperature,
        })
    }
}

impl Options {
    fn publishing(&self) -> Result<Option<Publishing>, BadConfig> {
        let addresses = [self.publish.as_ref(), self.publish_replay.as_ref()];
        if let Some(found) = addresses.into_iter().flatten().find(|address| !address.is_local()) {
            return Err(BadConfig::Publish { found: found.clone() });
        }
        Ok(self.publish.clone().map(|events| Publishing {
            events,
            replay: self.publish_replay.clone(),
            topic: self.publish_topic.clone(),
            media: self.publish_media,
            owner: self.cache_owner.clone(),
            worker: self.publish_worker,
        }))
    }
}

fn engines(lines: &[String]) -> Result<Vec<Spec>, BadConfig> {
    if lines.len() > ENGINES_MAX {
        return Err(BadConfig::Engines { count: lines.len() });
    }
    let mut engines: Vec<Spec> = Vec::with_capacity(lines.len());
    for line in lines {
        let spec = line.parse::<Spec>().map_err(|error| BadConfig::Engine { line: line.clone(), error })?;
        if engines.iter().any(|known| known.name == spec.name) {
            return Err(BadConfig::EngineTwice { found: spec.name });
        }
        engines.push(spec);
    }
    Ok(engines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &[&str]) -> Options {
        Options::parse_from(std::iter::once("terrace-router").chain(line.iter().copied()))
    }

    /// Events on a port that other machines reach, or two engines of one name, must be refused at the start.
    #[test]
    fn engines_and_subscribers_are_checked() {
        let one = "name=a,connect=tcp://a:1";
        let error = options(&["--engine", one, "--engine", one]).check().unwrap_err();
        assert_eq!(error, BadConfig::EngineTwice { found: "a".to_owned() });
        let error = options(&["--engine", "name=a"]).check().unwrap_err().to_string();
        assert!(error.starts_with("--engine name=a: "), "{error}");
        let error = options(&["--publish", "tcp://0.0.0.0:1"]).check().unwrap_err().to_string();
        assert!(error.contains("other machines"), "{error}");
        assert_eq!(options(&[]).check().unwrap().names_max, 0);
        let published = options(&["--publish", "tcp://127.0.0.1:1"]).check().unwrap();
        assert_eq!(published.names_max, NAMES, "what is published needs names");
    }

    /// A router that is told nothing must find a daemon that is told nothing.
    #[test]
    fn the_default_daemon_is_where_the_guide_says() {
        let guide = include_str!("../../docs/user-guide.md");
        let row = guide.lines().find(|line| line.starts_with("| `grpc_listen` |")).unwrap_or_default();
        let grpc = &options(&[]).grpc[0];
        let address = grpc.strip_prefix("http://").unwrap_or_default();
        assert!(row.contains(&format!("`\"{address}\"`")), "{grpc}: {row}");
    }

    /// A limit of zero, or an address without a scheme, must be refused at the start, with the option's name.
    #[test]
    fn useless_settings_are_refused() {
        assert_eq!(
            options(&["--queue-max", "0"]).check().unwrap_err(),
            BadConfig::Zero { name: "queue-max" }
        );
        let error = options(&["--grpc", "localhost"]).check().unwrap_err();
        assert!(error.to_string().contains("--grpc localhost"), "{error}");
        let twice =
            options(&["--grpc", "http://a:1,http://b:1", "--grpc", "http://a:1"]).check().unwrap_err();
        assert_eq!(twice, BadConfig::Twice { found: "http://a:1".to_owned() });
        let both = options(&["--grpc", "http://a:1", "--grpc", "http://b:1"]).check().unwrap();
        assert_eq!(both.grpc, ["http://a:1", "http://b:1"]);
        for weight in ["a", "a=0", "a=x", "a=inf"] {
            let error = options(&["--tenant-weight", weight]).check().unwrap_err();
            assert_eq!(error, BadConfig::TenantWeight { found: weight.to_owned() });
        }
        assert!(options(&["--tenant-header", "a b"]).check().is_err());
        assert!(options(&["--temperature", "NaN"]).check().is_err());
        assert!(options(&["--first-token-seconds-max", "0"]).check().is_err());
        let wanted = options(&["--first-token-seconds-max", "1.5"]).check().unwrap().first_token_by;
        assert_eq!(wanted, Some(Duration::from_millis(1500)));
        assert!(options(&[]).check().is_ok());
    }
}
