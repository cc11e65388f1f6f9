"""The `atelier` command. Each subcommand is a module; what it needs is imported when it runs, so that help comes at once."""

from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from atelier_cli import cluster_commands, install_check, models, plan, report, run, terminal, validate

USAGE_ERROR = 64
INTERNAL_ERROR = 70
INTERRUPTED = 130


class Commands(TyperGroup):
    """Turns every error into its exit code and one line per mistake; only a bug shows a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # of the last: the reader of a pipe has left
            raise
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except TyperException as error:
            terminal.say_errors(error.format_message())
            raise typer.Exit(USAGE_ERROR) from error
        except Exception as error:
            from atelier_api.errors import RunError

            if isinstance(error, RunError):
                terminal.say_errors(str(error))
                raise typer.Exit(int(error.exit_code)) from error
            terminal.say_bug(error)
            raise typer.Exit(INTERNAL_ERROR) from error


app = typer.Typer(
    cls=Commands,
    help="Fine-tune diffusion models from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(run.run)
app.command()(plan.plan)
app.command()(validate.validate)
app.command()(models.models)
app.command()(report.report)
for command in (
    cluster_commands.submit,
    cluster_commands.status,
    cluster_commands.logs,
    cluster_commands.stop,
    cluster_commands.resume,
    cluster_commands.delete,
):
    app.command()(command)
app.command("install-check")(install_check.install_check)

if __name__ == "__main__":
    app()
