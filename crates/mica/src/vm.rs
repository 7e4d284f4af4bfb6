//! `mica vm`: running VMs of this user, through their control sockets.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use mica_base::units::Bytes;
use mica_machine::vmm::control::{
    self, Answer, Command as Do, Greeting, MAX_LINE, Outcome, Request, Response, RunState,
};

use crate::OutputFormat;
use crate::runtime;

/// How long a VM may take to answer. Pausing waits for requests in flight, which may be slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What can be done with running VMs.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List the running VMs.
    List,
    /// Show what a VM is and does.
    State(Target),
    /// Let a VM stand still.
    Pause(Target),
    /// Let a paused VM go on.
    Resume(Target),
    /// Boot a VM again, whatever its guest is doing.
    Reset(Target),
    /// Press a VM's power button.
    PowerButton(Target),
    /// Take memory from a VM's guest, or give it back.
    Balloon {
        #[command(flatten)]
        target: Target,
        /// How much of the guest's memory to hold back, for example 256M.
        size: Bytes,
    },
    /// Show everything that is counted.
    Counters(Target),
    /// End a VM as when the plug is pulled.
    Stop(Target),
}

/// Which VM.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// The VM's name, or the path of its control socket.
    vm: String,
}

/// Runs one `mica vm` command.
pub(crate) fn run(command: Command, output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    let (target, request) = match command {
        Command::List => return list(output),
        Command::State(target) => (target, Do::State),
        Command::Pause(target) => (target, Do::Pause),
        Command::Resume(target) => (target, Do::Resume),
        Command::Reset(target) => (target, Do::Reset),
        Command::PowerButton(target) => (target, Do::PowerButton),
        Command::Balloon { target, size } => (target, Do::Balloon { target: size.0 }),
        Command::Counters(target) => (target, Do::Counters),
        Command::Stop(target) => (target, Do::Stop),
    };
    let answer = Client::connect(&target.path())?.ask(request)?;
    match output {
        OutputFormat::Json => println!("{}", serde_json::to_string(&answer)?),
        OutputFormat::Text => print_text(&answer),
    }
    Ok(ExitCode::SUCCESS)
}

impl Target {
    fn path(&self) -> PathBuf {
        if self.vm.contains('/') {
            PathBuf::from(&self.vm)
        } else {
            runtime::directory().join(format!("{}.sock", self.vm))
        }
    }
}

fn print_text(answer: &Answer) {
    match answer {
        Answer::State(state) => {
            let run_state = match state.state {
                RunState::Running => "running",
                RunState::Paused => "paused",
            };
            println!("state        {run_state}");
            println!("vcpus        {}", state.vcpus);
            println!("memory       {}", Bytes(state.memory));
            println!("engine       {}", state.engine);
            println!("cpu profile  {}", state.cpu_profile);
            println!("process      {}", state.pid);
            println!(
                "uptime       {:.1} s",
                Duration::from_millis(state.uptime_ms).as_secs_f64()
            );
        }
        Answer::Counters { counters } => {
            let width = counters.keys().map(String::len).max().unwrap_or(0);
            for (name, value) in counters {
                println!("{name:width$}  {value}");
            }
        }
        Answer::Done {} => {}
    }
}

fn list(output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    let mut rows = Vec::new();
    for (name, path) in runtime::control_sockets()? {
        // A socket nobody listens on is what a killed VM left behind.
        let Ok(mut client) = Client::connect(&path) else {
            continue;
        };
        if let Answer::State(state) = client.ask(Do::State)? {
            rows.push((name, state));
        }
    }
    match output {
        OutputFormat::Json => {
            let values: Vec<_> = rows
                .iter()
                .map(|(name, state)| serde_json::json!({ "name": name, "vm": state }))
                .collect();
            println!("{}", serde_json::Value::from(values));
        }
        OutputFormat::Text => {
            println!(
                "{:20} {:8} {:>5} {:>8} {:>8}",
                "NAME", "STATE", "VCPUS", "MEMORY", "PROCESS"
            );
            for (name, state) in rows {
                let run_state = match state.state {
                    RunState::Running => "running",
                    RunState::Paused => "paused",
                };
                let memory = Bytes(state.memory).to_string();
                println!(
                    "{name:20} {run_state:8} {:>5} {memory:>8} {:>8}",
                    state.vcpus, state.pid
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A connection to a VM's control socket.
struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    fn connect(path: &std::path::Path) -> Result<Self, Box<dyn Error>> {
        let stream = UnixStream::connect(path).map_err(|error| {
            format!(
                "no VM answers at {} ({error}); 'mica vm list' shows the running ones",
                path.display()
            )
        })?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut client = Self {
            reader: BufReader::new(stream),
        };
        let greeting: Greeting = client.read()?;
        if greeting.version != control::VERSION {
            return Err(format!(
                "{} speaks version {} of the control protocol, this mica speaks {}",
                path.display(),
                greeting.version,
                control::VERSION
            )
            .into());
        }
        Ok(client)
    }

    fn read<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, Box<dyn Error>> {
        let mut line = Vec::new();
        (&mut self.reader)
            .take(16 * MAX_LINE as u64)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err("the VM closed its control socket".into());
        }
        Ok(serde_json::from_slice(&line)?)
    }

    fn ask(&mut self, command: Do) -> Result<Answer, Box<dyn Error>> {
        let request = Request { id: None, command };
        self.reader
            .get_mut()
            .write_all(&control::to_line(&request))?;
        match self.read::<Response>()?.outcome {
            Outcome::Ok(answer) => Ok(answer),
            Outcome::Error { message, .. } => Err(message.into()),
        }
    }
}
