"""The studio: a page on which a model is drawn beside its base, while its operators, layers and guidance are changed.

    from surgery.studio.opening import open_for_page
    from surgery.studio.session import Session

    opened = open_for_page("shapes", out="out/studio")
    session = Session(opened)
    for event in session.draw(screen_of({"prompt": "a red circle"}, opened)):
        ...

What is on the screen is a Screen, what is done with it a Session's; page.py alone knows Gradio.
"""
