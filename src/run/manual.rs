//! `completions` and `man`: what clap derives from the command line itself, for packagers.

use std::fs;
use std::io;
use std::process::ExitCode;

use clap::builder::Resettable;
use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use super::print;
use crate::cli::{Cli, CompletionsArgs, ManArgs};
use crate::error::Error;
use crate::write::{WriteError, replace_file};

const NAME: &str = "mats-stream";

pub(super) fn completions(args: &CompletionsArgs) -> Result<ExitCode, Error> {
    // Into memory first: clap_complete panics where a write fails, and stdout may be closed.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), NAME, &mut script);
    print(|out| out.write_all(&script))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn man(args: &ManArgs) -> Result<ExitCode, Error> {
    // `help` has no page of its own, below no command.
    let mut command =
        Cli::command().disable_help_subcommand(true).mut_subcommands(|c| c.disable_help_subcommand(true));
    // Names of subcommands and the flags that all of them share are filled in only now.
    command.build();
    let Some(directory) = &args.directory else {
        print(|out| page(&command, NAME, out))?;
        return Ok(ExitCode::SUCCESS);
    };
    let refuse = |source| {
        let doing = "make the directory for man pages";
        Error::from(WriteError::Unusable { path: directory.clone(), doing, source })
    };
    fs::create_dir_all(directory).map_err(refuse)?;
    for (name, command) in pages(NAME, &command) {
        let mut roff = Vec::new();
        page(command, &name, &mut roff).map_err(refuse)?;
        replace_file(directory, &format!("{name}.1"), &roff)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A command's page and those of all commands below it, by name.
fn pages<'a>(name: &str, command: &'a Command) -> Vec<(String, &'a Command)> {
    let below = command.get_subcommands().filter(|c| !c.is_hide_set());
    let below = below.flat_map(|c| pages(&format!("{name}-{}", c.get_name()), c));
    below.chain([(name.to_owned(), command)]).collect()
}

/// One page in roff, titled by `name`.
fn page(command: &Command, name: &str, out: &mut dyn io::Write) -> io::Result<()> {
    let notes = command.get_after_help().map(ToString::to_string);
    let command = command.clone().after_help(Resettable::Reset);
    let source = concat!("mats-stream ", env!("CARGO_PKG_VERSION"));
    Man::new(command).title(name.to_uppercase()).source(source).render(&mut *out)?;
    let Some(notes) = notes else { return Ok(()) };
    // Not clap_mangen's section for it, which would fill the lines: these are laid out in columns.
    let mut section = Roff::new();
    section.control("SH", ["EXAMPLES AND EXIT STATUS"]).control("nf", []);
    for line in notes.lines() {
        section.text([roman(line)]);
    }
    section.control("fi", []).to_writer(out)
}
