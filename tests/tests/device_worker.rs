//! Workers whose blocks lie in device memory, with a real daemon: one computes and seals there, another goes on from there
//! without a copy, and one on the processor gets the same bits in host memory. The device is host memory in its place,
//! and the kernels of devices run on the processor; both are asked for by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use terrace_proto::v1::generate_response::Part;
use terrace_proto::v1::worker_service_client::WorkerServiceClient;
use terrace_proto::v1::{GenerateRequest, PrefillRequest};
use terrace_tests::node::{DEADLINE, program};
use terrace_worker::tiny::TinyModel;

/// A process that is killed when dropped, and the line in which it said that it is ready.
struct Running {
    child: Child,
    ready: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(command: &mut Command, ready: &'static str) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (said, found) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                eprintln!("{line}");
                if line.contains(ready) {
                    // The test may be over already.
                    let _ = said.send(line);
                }
            }
        });
        let mut running = Self { child, ready: String::new() };
        running.ready = found.recv_timeout(DEADLINE).unwrap();
        running
    }

    /// What stands behind a word in the line.
    fn field(&self, name: &str) -> &str {
        let rest = self.ready.split_once(name).unwrap_or_else(|| panic!("no {name} in {}", self.ready)).1;
        rest.split([' ', ',']).next().unwrap()
    }
}

fn daemon(folder: &Path) -> Running {
    let config = format!(
        "data_dir = {:?}\nlane_socket = {:?}\ngrpc_listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\n\
         pinned_bytes = \"32MiB\"\nchunk_bytes = \"4MiB\"\n[[hbm]]\ndevice = \"host-only\"\nbytes = \"16MiB\"\n\
         [[device]]\npath = {:?}\nbytes = \"64MiB\"\n",
        folder.join("data"),
        folder.join("lane.sock"),
        folder.join("nvme0.dat"),
    );
    let file = folder.join("terraced.toml");
    std::fs::write(&file, config).unwrap();
    Running::start(Command::new(program("terraced")).arg("--config").arg(file), "terraced ready")
}

struct Worker {
    running: Running,
}

impl Worker {
    fn start(folder: &Path, role: &str, device: &str, socket: bool) -> Self {
        let mut command = Command::new(program("terrace-worker"));
        command.args([
            role,
            "--name",
            &format!("{role}-{device}"),
            "--device",
            device,
            "--threads",
            "1",
            "--model",
        ]);
        command.arg(folder.join("tiny.gguf")).env("RUST_LOG", "info").env("NO_COLOR", "1");
        if socket {
            command.arg("--socket").arg(folder.join("lane.sock"));
        }
        Self { running: Running::start(&mut command, "worker ready") }
    }

    async fn client(&self) -> WorkerServiceClient<tonic::transport::Channel> {
        WorkerServiceClient::connect(format!("http://{}", self.running.field("address="))).await.unwrap()
    }

    /// Tokens from the cache, and those that follow the prompt.
    async fn generate(&self, tokens: &[u32]) -> (u32, Vec<u32>) {
        let request =
            GenerateRequest { tokens: tokens.to_vec(), tokens_max: 20, ..GenerateRequest::default() };
        let mut parts = self.client().await.generate(request).await.unwrap().into_inner();
        let (mut cached, mut found) = (None, Vec::new());
        while let Some(response) = parts.message().await.unwrap() {
            match response.part.unwrap() {
                Part::Started(started) => cached = Some(started.cached_tokens),
                Part::Token(token) => found.push(token),
                Part::Finished(_) => {}
            }
        }
        (cached.unwrap(), found)
    }

    async fn metric(&self, name: &str) -> u64 {
        let url = format!("http://{}/metrics", self.running.field("metrics="));
        let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
        let text = http.get(url).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} "))).map(str::to_owned);
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }
}

// A block could be copied where it should be used in place, sealed with a sum of other bytes, or differ by a bit between a
// device and a processor: compute a prompt on a device, go on from its blocks there and in host memory, and compare
// with a worker that knows no store.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_stay_on_the_device_and_have_the_same_bits() {
    let folder = tempfile::Builder::new().prefix("terrace-device").tempdir().unwrap();
    let folder = folder.path();
    TinyModel::default().write(&folder.join("tiny.gguf")).unwrap();
    let _daemon = daemon(folder);
    let prompt: Vec<u32> = (0..).map(|at: u32| at * 37 % 250).take(100).collect();
    let (_, expected) = Worker::start(folder, "decode", "cpu", false).generate(&prompt).await;
    assert_eq!(expected.len(), 20);

    let first = Worker::start(folder, "prefill", "host-only", true);
    let request = PrefillRequest { tokens: prompt.clone(), ..PrefillRequest::default() };
    let computed = first.client().await.prefill(request).await.unwrap().into_inner();
    // What is no whole block is for who goes on.
    assert_eq!((computed.cached_tokens, computed.computed_tokens), (0, 96));
    assert_eq!(first.metric("terrace_worker_blocks_on_device_total").await, 6, "filled in place");
    assert_eq!(first.metric("terrace_worker_blocks_sealed_total").await, 6);
    drop(first);

    let second = Worker::start(folder, "decode", "host-only", true);
    let (cached, found) = second.generate(&prompt).await;
    assert_eq!((cached, &found), (96, &expected), "from blocks on the device");
    let on_device = second.metric("terrace_worker_blocks_on_device_total").await;
    assert!(on_device >= 6, "read in place: {on_device}");
    drop(second);

    let third = Worker::start(folder, "decode", "cpu", true);
    let (cached, found) = third.generate(&prompt).await;
    assert_eq!((cached, &found), (96, &expected), "from the same blocks in host memory");
}
